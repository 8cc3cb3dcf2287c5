"""What docs/reproducing.md says of the paper's tables is what the committed results say."""

import json
import math
import re
import statistics
from typing import Any

import pytest
from pages import ROOT, recorded, rows, section
from paper.experiment import names, specs

REPRODUCING = ROOT / "docs" / "reproducing.md"
SMALL = ROOT / "benchmarks" / "results" / "small"
OWN = ("built-in code", "built-in")
BOOKS = ("WikiText-2", "PTB", "novels", "children")
LEARNING = ("qat", "quadapter-bc+qat", "quadapter")
RATES = {"1e-5": "1e-05", "3e-5": "3e-05", "1e-4": "0.0001", "3e-4": "0.0003"}


def test_the_seeds_of_table_1_are_what_was_measured() -> None:
    small = ROOT / "benchmarks" / "results" / "small" / "embedded" / "table1" / "gpt2"
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (\S.*?)(?: \(1 000.*?\)|, lr 1e-4)? \| (.* ± .*) \| (.* ± .*) \|$", text, re.M
    )
    assert len(lines) == 8
    for row, *cells in lines:
        name = row.lower().removesuffix(" from ptq").replace(" ", "-")
        found = [
            json.loads(f.read_text(encoding="utf-8")) for f in small.glob(f"{name}_*seed?.json")
        ]
        assert sorted(r["seed"] for r in found) == [0, 1, 2]
        for cell, text_name in zip(cells, ("built-in code", "built-in"), strict=True):
            scores = [r["perplexity"][text_name] for r in found]
            mean, spread = (float(x) for x in cell.split(" ± "))
            assert mean == pytest.approx(statistics.mean(scores), abs=0.06)
            assert spread == pytest.approx(statistics.stdev(scores), abs=0.06)


def scores(folder: str, text: str) -> dict[str, float]:
    """Row of Table 1 → perplexity, the mean of the seeds that all rows have."""
    found: dict[str, dict[int, float]] = {}
    for file in (ROOT / "benchmarks/results/small" / folder / "table1/gpt2").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["row"], {})[result["seed"]] = result["perplexity"][text]
    seeds = set.intersection(*map(set, found.values()))
    return {row: statistics.mean(of[seed] for seed in seeds) for row, of in found.items()}


OF_TEXTS = {
    "embedded": ("built-in code", ["built-in"]),
    "small-gpt2": ("WikiText-2", ["PTB", "novels", "children"]),
}
"""Folder of results → text that its rows are fine-tuned on, and the others."""


@pytest.mark.parametrize("folder", OF_TEXTS)
def test_the_order_that_is_called_the_papers_is_in_the_results(folder: str) -> None:
    inside, outside = OF_TEXTS[folder]
    for text in (inside, *outside):
        of = scores(folder, text)
        assert of["PTQ"] > of["AdaRound"] > of["CLE"] > of["Quadapter BC"]
        assert of["Quadapter BC"] == pytest.approx(of["FP32"], rel=0.015)
        assert of["Quadapter"] <= of["Quadapter BC"]
    of = scores(folder, inside)
    assert max(of["QAT"], of["Quadapter BC+QAT"]) < min(of["FP32"], of["Quadapter"])
    for text in outside:
        of = scores(folder, text)
        assert of["QAT"] == max(of.values())
        assert of["Quadapter"] < 1.05 * of["FP32"]


UNTRAINED = {
    "FP32": ("fp32",),
    "PTQ": ("ptq",),
    "CLE": ("cle",),
    "SmoothQuant": ("smoothquant",),
    "Quadapter BC": ("quadapter-bc",),
}


def swept(folder: str, text: str, of: dict[str, str], methods: int = 1) -> dict[str, Any]:
    """Line → results at a place of a sweep, one for each of the first methods."""
    first = LEARNING[:methods]
    return {line: tuple(f"{folder}/{row}_{text}_{x}" for row in first) for line, x in of.items()}


SMALL_TABLES: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "What came out at the small scale": (
        "embedded",
        OWN,
        {
            "FP32": ("table1/gpt2/fp32",),
            "FP32, fine-tuned (Figure 5)": ("figure5/fp32-fine-tuned_built-in-code",),
            "none": ("table1/gpt2/ptq", "steps/quadapter-bc"),
            **swept("steps", "built-in-code", {n: n for n in ("30", "100", "300")}, 2),
            **swept("steps", "built-in-code", {"1 000": "1000"}, 2),
            "none (PTQ)": ("table1/gpt2/ptq",),
            **swept("overfitting", "built-in-code", RATES),
            **swept("figure3", "built-in-code", {n: n for n in ("8", "128")}, 3),
            "all": tuple(f"table1/gpt2/{row}_built-in-code" for row in LEARNING),
        },
    ),
    "Beside AIMET's own techniques": (
        "embedded/aimet",
        OWN,
        {
            "FP32": ("fp32",),
            "PTQ": ("ptq", "quadapter-bc"),
            "SeqMSE": ("seqmse", "quadapter-bc-then-seqmse"),
            "AdaRound": ("adaround", "quadapter-bc-then-adaround"),
            "AdaScale": ("adascale", "quadapter-bc-then-adascale"),
            "CLE": ("cle",),
            "SmoothQuant": ("smoothquant",),
        },
    ),
    "SmolLM2-135M, a real language model": (
        "smollm2/table1/smollm2",
        BOOKS[:2],
        {
            **UNTRAINED,
            "QAT from PTQ, lr 3e-5": ("qat_wikitext-2",),
            "Quadapter BC+QAT, lr 3e-5": ("quadapter-bc+qat_wikitext-2",),
            "Quadapter": ("quadapter_wikitext-2",),
        },
    ),
    "A larger small GPT-2": (
        "small-gpt2",
        BOOKS,
        {
            **{line: (f"table1/gpt2/{file}",) for line, (file,) in UNTRAINED.items()},
            "AdaRound (200 iterations)": ("table1/gpt2/adaround",),
            "QAT from PTQ, lr 1e-4, 100 steps": ("table1/gpt2/qat_wikitext-2",),
            "Quadapter BC+QAT, lr 1e-4": ("table1/gpt2/quadapter-bc+qat_wikitext-2",),
            "Quadapter": ("table1/gpt2/quadapter_wikitext-2",),
            "none (PTQ)": ("table1/gpt2/ptq",),
            **swept("overfitting", "wikitext-2", RATES),
        },
    ),
}
"""Heading → folder of results, texts, and line → the results whose perplexities it has."""


@pytest.mark.parametrize("heading", SMALL_TABLES)
def test_the_tables_of_the_small_scale_are_what_was_measured(heading: str) -> None:
    folder, texts, lines = SMALL_TABLES[heading]
    found = [line for line in rows(section(REPRODUCING, heading)) if "±" not in "".join(line)]
    assert sorted(name for name, *_ in found) == sorted(lines)
    for name, *cells in found:
        scores = [small(f"{folder}/{file}")[text] for file in lines[name] for text in texts]
        assert " / ".join(filter(None, cells)) == " / ".join(f"{x:.2f}" for x in scores)


def small(row: str, seed: int = 0) -> dict[str, float]:
    """Perplexities of a run of the small scale."""
    (file,) = SMALL.glob(f"{row}_*seed{seed}.json")
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["perplexity"]
    return found


def test_what_is_said_of_the_small_scale_is_what_was_measured() -> None:
    text = " ".join(REPRODUCING.read_text(encoding="utf-8").split())
    ranges_fixed = small("embedded/table3/gpt2/qat_built-in-code")
    wanted = [" / ".join(f"{ranges_fixed[name]:.2f}" for name in OWN) + " for it without"]
    one = "embedded/table1/gpt2"
    before, after = (small(f"{one}/{row}") for row in ("quadapter-bc", "quadapter_built-in-code"))
    wanted.append(f"under seed 0 {after['built-in']:.2f} after {before['built-in']:.2f}")
    wanted.append(f"FP32's {small(f'{one}/fp32')['built-in code']:.2f} there")
    wanted.append(f"PTQ's {small(f'{one}/ptq')['built-in']:.2f} all the way")
    forgets = small("embedded/figure5/fp32-fine-tuned_built-in-code")["built-in"]
    kept = small(f"{one}/quadapter-bc+qat_built-in-code")["built-in"]
    wanted += [f"forgets too: {forgets:.2f};", f"keeps {kept:.2f}."]
    trained = recorded("cost/train_small_gpt2.json")
    wanted.append(f"{trained['parameters'] / 1e6:.1f} M parameters")
    wanted.append(f"{trained['recipe']['steps']} steps of {trained['recipe']['batch']} × 512")
    wanted.append(f"{trained['tokens']:,} tokens".replace(",", " "))
    wanted.append(f"{trained['minutes']} minutes on {trained['threads']} threads")
    assert [x for x in wanted if x not in text] == []


def test_the_other_seeds_of_the_larger_gpt2_are_what_was_measured() -> None:
    text = " ".join(section(REPRODUCING, "A larger small GPT-2").split())
    one = "small-gpt2/table1/gpt2"
    ptq, cle = ([small(f"{one}/{row}", seed) for seed in (1, 2)] for row in ("ptq", "cle"))
    spans = [f"{ptq[0][name]:,.0f}–{ptq[1][name]:,.0f}".replace(",", " ") for name in BOOKS]
    assert f"PTQ is {' / '.join(spans)}," in text
    for of in cle:
        assert f"CLE {' / '.join(f'{of[name]:.0f}' for name in BOOKS)}," in text
    fp32, last = small(f"{one}/fp32"), small(f"{one}/quadapter_wikitext-2")
    others = [small(f"{one}/{r}", s) for r in ("smoothquant", "quadapter-bc") for s in (1, 2)]
    furthest = 100 * max(abs(of[name] / fp32[name] - 1) for of in others for name in BOOKS)
    assert f"within {math.ceil(10 * furthest) / 10} % of FP32)" in text
    above = [100 * (last[name] / fp32[name] - 1) for name in BOOKS[1:]]
    assert f"within {max(above):.1f} % of FP32 outside WikiText-2" in text
    gain = 100 * (1 - last["WikiText-2"] / small(f"{one}/quadapter-bc")["WikiText-2"])
    assert f"fine-tuning gives Quadapter {gain:.1f} % only" in text


def spent(name: str, stage: str = "methods") -> float:
    """Seconds of a stage on a GPT-2 of the real shape."""
    seconds: float = recorded(f"cost/{name}.json")["seconds"][stage]
    return seconds


def a_step() -> dict[str, float]:
    """Method → seconds of one of its steps there."""
    more, fewer = (spent(f"quadapter_bc_{n}_steps", "phase 1") for n in (25, 5))
    rows = {"qat": "qat_2_steps", "quadapter_ft": "quadapter_2_steps"}
    two = {method: (spent(file) - spent("ptq")) / 2 for method, file in rows.items()}
    return {"quadapter_bc": (more - fewer) / 20, **two}


def phase_1() -> tuple[float, float]:
    """Seconds besides its steps, and hours with the paper's 500."""
    step = a_step()["quadapter_bc"]
    rest = spent("quadapter_bc_25_steps", "phase 1") - 25 * step
    return rest, (rest + 500 * step) / 3600


def test_what_a_run_of_the_papers_scale_takes_is_arithmetic_on_what_was_measured() -> None:
    text = REPRODUCING.read_text(encoding="utf-8")
    step, (rest, hours) = a_step(), phase_1()
    faster = hours * 60 / 2
    assert f"divided by {faster:.0f}, which is what lies between our {hours:.1f} hours" in text
    first = f"| {step['quadapter_bc']:.1f} s a step of all pairs, {rest:.0f} s besides"
    assert f"{first} | {hours:.1f} h | 2 min (the paper's) |" in text
    for method, file in (("qat", "qat_2_steps"), ("quadapter_ft", "quadapter_2_steps")):
        memory = recorded(f"cost/{file}.json")["peak_memory_gib"]
        own = step[method] * 10_000 / 3600
        line = f"| {step[method]:.1f} s a step, {memory:.1f} GiB | {own:.0f} h |"
        assert f"{line} {own * 60 / faster:.0f} min |" in text
    seconds = spent("quadapter_2_steps", "evaluate")
    all_tokens = seconds * 100_000 / 4096
    line = (
        f"| {seconds:.0f} s for 4 096 | {all_tokens / 60:.0f} min | {all_tokens / faster:.0f} s |"
    )
    assert line in text


def test_what_each_experiment_takes_is_arithmetic_on_what_was_measured() -> None:
    text = section(REPRODUCING, "What each number takes")
    found = re.findall(r"^\| .*? \| `(\S+)`.*? \| (\d+) \| (.*) \| (.*) \|$", text, re.M)
    assert sorted(name for name, *_ in found) == names()
    small_scale = sums()
    for name, runs, cell, measured_here in found:
        assert int(runs) == len(list(specs(name)))
        if re.search(r"\d", cell):
            assert cell == expected(name)
        count, seconds = small_scale[name]
        if count:
            counted = rf"{count}(?: \(3 seeds\))?, {sum(seconds.values()):.0f} s"
            assert re.fullmatch(counted, measured_here)
    figures = [of for name, (_, of) in small_scale.items() if name.startswith(("table", "figure"))]
    minutes = f"{sum(of.get(0, 0) for of in figures) / 60:.0f} minutes of one thread"
    assert f"The tables and figures under one seed are {minutes}" in " ".join(text.split())
    recipes = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"{minutes} for the tables and figures under one seed" in recipes


def expected(name: str) -> str:
    """Of an experiment: on two cores, and on the paper's GPU."""
    runs, step, (_, hours) = list(specs(name)), a_step(), phase_1()
    stages = {"qat": "qat", "quadapter_ft": "phase2"}
    learned = sum(
        step[method] * run.stage(stages[method]).steps
        for run in runs
        for method in run.methods
        if method in stages
    )
    total = learned / 3600 + hours * len({r.seed for r in runs if "quadapter_bc" in r.methods})
    faster = hours * 60 / 2
    if not learned:
        return f"{total:.0f} h / {total * 60 / faster:.0f} min"
    return f"{total / 48:.0f} days / {total / faster:.0f} h"


def sums() -> dict[str, tuple[int, dict[int, float]]]:
    """Experiment → its results of the small scale; seed → seconds of those not counted before."""
    counted, found = set(), {}
    for name in names():
        files = sorted((SMALL / "embedded" / name).glob("*.json"))
        seconds: dict[int, float] = {}
        for file in files:
            result = json.loads(file.read_text(encoding="utf-8"))
            mark = json.dumps([result["seconds"], result["stamp"]["time"]])
            if mark not in counted:
                own = sum(s for stage, s in result["seconds"].items() if stage != "phase 1")
                seconds[result["seed"]] = seconds.get(result["seed"], 0) + own
            counted.add(mark)
        found[name] = len(files), seconds
    return found
