"""The tables of the pages hold what the committed results say."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from pages import ROOT, measured, perplexities, recorded, rows, section

from aimet_quadapter.cli.settings import TIERS as TIER_SETTINGS
from aimet_quadapter.cli.settings import resolve

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"


def test_the_table_is_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    smollm2 = json.loads((results / "smollm2_w8a8.json").read_text(encoding="utf-8"))["rows"]
    small = results / "small" / "embedded" / "table1" / "gpt2"
    names = {"FP32": "FP", "SmoothQuant 0.5": "smoothquant", "Quadapter, phase 1": "quadapter"}
    files = {"SmoothQuant 0.5": "smoothquant", "Quadapter, phase 1": "quadapter-bc"}
    text = section(PAGE, "Perplexity")
    lines = re.findall(r"^\| .*\.\d\d(?:\*\*)? \|$", text, re.M)
    assert len(lines) == 5
    for line in lines:
        method, *cells = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
        rows = [r for r in smollm2 if r["method"] == names.get(method, method.lower())]
        assert len(rows) == (1 if method == "FP32" else 2)
        for cell, row in zip(cells, rows, strict=False):
            assert cell == " / ".join(f"{v:.2f}" for v in row["perplexity"].values())
        file = small / f"{files.get(method, method.lower())}_seed0.json"
        measured = json.loads(file.read_text(encoding="utf-8"))["perplexity"]["built-in"]
        assert cells[-1] == f"{measured:.2f}"


METHODS = {
    "FP32": "FP",
    "PTQ": "ptq",
    "CLE": "cle",
    "SmoothQuant 0.5": "smoothquant",
    "Quadapter, phase 1": "quadapter",
}


def test_the_readmes_first_table_is_a_part_of_the_pages() -> None:
    """SmolLM2 at 8 bits everywhere on the first text, and the embedded model."""
    own = rows(README.read_text(encoding="utf-8"))
    embedded = {name: cells[-1] for name, *cells in rows(section(PAGE, "Perplexity"))}
    assert [name for name, *_ in own] == list(METHODS)
    for name, smollm2, small in own:
        method = METHODS[name] if name != "FP32" else "FP behind the prefix"
        assert smollm2 == eight(method).split(" / ")[0]
        assert small == embedded[name]
    softmax = measured("eight_bits/smollm2_w8a8_compensated.json", "quadapter", 8, 1)
    assert f"`compensate_softmax` on top it has {softmax}." in README.read_text(encoding="utf-8")


def test_the_table_of_real_models_is_what_was_measured() -> None:
    found = rows(section(PAGE, "Three real models"))
    assert [name for name, *_ in found] == list(METHODS)
    files = [
        f"real/{m}_{b}.json" for m in ("smollm2", "gemma3", "qwen2") for b in ("w8a8", "w8a16")
    ]
    for name, *cells in found:
        assert cells == [measured(file, METHODS[name]) for file in files]


def test_what_each_step_to_eight_bits_buys_is_what_was_measured() -> None:
    text = section(ROOT / "docs" / "eight-bits.md", "What each step buys")
    found = rows(text)
    assert len(found) == len(STEPS)
    for (_, cell), (file, method) in zip(found, STEPS, strict=True):
        assert cell == (eight(method) if file is None else measured(file, method))
    for file, method in (("smollm2_w8a8_rate.json", "quadapter"), *STEPS[-2:]):
        assert ratio(f"eight_bits/{Path(file).name}", method, 8) in " ".join(text.split())


def eight(method: str, bits: int = 8, texts: int | None = 2) -> str:
    """SmolLM2 behind prefix and rotation; α that was chosen with these bits of the stream."""
    own = "smollm2_w8a8_rate" if (method, bits) == ("quadapter", 8) else "smollm2_w8a8"
    residual = None if method == "FP behind the prefix" else bits
    return measured(f"eight_bits/{own}.json", method, residual, texts)


def test_what_a_run_takes_and_gives_is_what_was_measured() -> None:
    result = recorded("eight_bits/smollm2_run.json")
    seconds = result["seconds"]
    perplexities = sum(s for stage, s in seconds.items() if stage.startswith("evaluate"))
    wanted = [
        f"{sum(seconds.values()) / 60:.1f} minutes",
        f"{seconds['quadapter']:.0f} s phase 1 and its choice",
        f"{seconds['export']:.0f} s the export",
        f"{seconds['prefix and rotation']:.0f} s prefix and rotation",
        f"{perplexities:.0f} s the four perplexities",
        f"{result['peak_bytes'] / 2**30:.1f} GiB",
    ]
    for stage in ("FP32", "PTQ", "Quadapter"):
        wanted.append(f"{stage} {result['perplexity'][stage]['built-in']:.2f}")
    fast = recorded("eight_bits/smollm2_run_fast.json")
    wanted.append(f"`--tier fast` took {sum(fast['seconds'].values()) / 60:.1f} minutes")
    wanted.append(f"({fast['perplexity']['Quadapter']['built-in']:.2f})")
    plain = (run["seconds"]["evaluate FP32"] for run in (fast, result))
    wanted.append("perplexity took {:.0f} s, here {:.0f}".format(*plain))
    page = (ROOT / "docs" / "eight-bits.md").read_text(encoding="utf-8")
    text = " ".join(page.split("## What each step buys")[0].split())
    assert [x for x in wanted if x not in text] == []


def test_the_way_to_a_phone_is_what_was_measured() -> None:
    text = " ".join((ROOT / "docs" / "phone.md").read_text(encoding="utf-8").split())
    result = recorded("eight_bits/smollm2_phone.json")
    rows = [" / ".join(f"{x:.2f}" for x in of.values()) for of in result["perplexity"].values()]
    assert f"{rows[1]}, {rows[2]} and {rows[3]}" in text
    minutes, memory = sum(result["seconds"].values()) / 60, result["peak_bytes"] / 2**30
    assert f"{minutes:.0f} minutes, {memory:.1f} GiB" in text
    assert f"prefix {result['recipe']['prefix']}, rotated" in text
    assert result["recipe"]["rotate"] == "hadamard"


def test_how_near_the_htp_is_to_a_run_is_what_was_measured() -> None:
    numbers = recorded("eight_bits/smollm2_run_htp.json")["numbers"]
    same, htp, perplexities = numbers["HTP = sim"], numbers["htp"], numbers["perplexity"]
    change = 100 * (perplexities["HTP"] / perplexities["CPU"] - 1)
    wanted = [
        f"{htp['operations']} of {htp['operations']} operations",
        f"compiled in {htp['seconds']:.0f} s",
        f"first {same['positions']} tokens",
        *(f"{100 * same[key] / same['positions']:.1f} %" for key in ("same_or_tie", "same")),
        f"{perplexities['CPU']:.2f} of the file",
        f"{perplexities['HTP']:.2f} on the HTP",
        f"−{-change:.1f} %",
    ]
    text = " ".join(section(ROOT / "docs" / "eight-bits.md", "On the HTP").split())
    assert [x for x in wanted if x not in text] == []


def test_eight_bits_on_other_texts_is_what_was_measured() -> None:
    page = ROOT / "docs" / "eight-bits.md"
    text = section(page, "On other text, and with sums at 16 bits")
    *found, (_, *made_up_for) = rows(text)
    softmax = {8: "smollm2_w8a8_compensated", 16: "smollm2_w8a8_softmax"}
    wanted = [(f"eight_bits/{file}.json", "quadapter", bits) for bits, file in softmax.items()]
    assert made_up_for == [measured(*of, texts=None) for of in wanted]
    for of in wanted:
        assert ratio(*of, texts=None) in " ".join(text.split())
    assert measured(wanted[1][0], "quadapter", 8, None) in text
    assert [name for name, *_ in found] == list(METHODS)
    for name, *cells in found:
        method = "FP behind the prefix" if name == "FP32" else METHODS[name]
        assert cells == [eight(method, bits, None) for bits in (8, 16)]
    assert measured("eight_bits/smollm2_w8a8.json", "quadapter", 8, None) in text
    layers = section(page, "Layers instead of blocks")
    assert measured("eight_bits/smollm2_w8a8_layers.json", "quadapter", 8, None) in layers
    own = "eight_bits/smollm2_w8a8_ablation.json"
    divergences = recorded(own)["divergence"]
    variants = ("ones", "block", "layer", "quantized inputs", "across the nonlinearity")
    for variant, (_, divergence, cell) in zip(variants, rows(layers), strict=True):
        assert divergence == f"{divergences[variant]:.3f}"
        assert cell == measured(own, variant)


def test_what_a_smaller_rate_gives_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "method.md", "Steps and learning rate"))
    files = ("smollm2_w8a8_all", "smollm2_w8a8_rate")
    for name, (steps, *shares, scores) in zip(files, found, strict=True):
        file = f"eight_bits/{name}.json"
        result = recorded(file)
        assert steps.startswith(f"{result['settings']['steps']}, ")
        assert scores == measured(file, "quadapter", 8, None)
        for kind, share in zip(("norm-linear", "v-o", "up-down"), shares, strict=True):
            losses = [r["losses"] for r in result["learned"] if r["kind"] == kind]
            starts = ("ones", "cle", "smoothquant")
            logs = [math.log(x["learned"] / min(x[s] for s in starts)) for x in losses]
            assert share == f"{math.exp(statistics.fmean(logs)):.3f}"


def test_the_prefixes_that_were_tried_are_what_was_measured() -> None:
    text = section(ROOT / "docs" / "eight-bits.md", "The prefix")
    tried = recorded("eight_bits/smollm2_prefix.json")["prefixes"]
    lines = re.findall(r"^\| (?:.*\[(.*)\]|none) \| (.*) \| (.*) \| (.*) % \|$", text, re.M)
    assert len(lines) == 6
    for ids, *numbers in lines:
        (own,) = [c for c in tried if ", ".join(map(str, c["ids"])) == ids]
        wanted = f"{own['loss']:.3f}", f"{own['spread']:.2f}", f"{100 * own['outliers']:.1f}"
        assert tuple(numbers) == wanted
    assert measured("eight_bits/smollm2_space.json", "ptq", 8) in text
    assert eight("ptq") in text


def test_eight_bits_of_other_models_are_what_was_measured() -> None:
    text = section(ROOT / "docs" / "eight-bits.md", "Qwen2.5 and Gemma 3")
    found = rows(text)
    assert [name for name, *_ in found] == list(METHODS)
    for name, qwen2, gemma3 in found:
        method, bits = METHODS[name], 8
        if name == "FP32":
            method, bits = "FP behind the prefix", None
        own = "_quadapter" if method == "quadapter" else ""
        assert qwen2 == measured(f"eight_bits/qwen2_w8a8{own}.json", method, bits, None)
        assert gemma3 == measured("eight_bits/gemma3_w8a8_stream16.json", method, None, None)
    assert measured("eight_bits/qwen2_w8a8_quadapter.json", "quadapter", 16, None) in text
    losses = recorded("eight_bits/gemma3_w8a8_stream16.json")["choice of α"]["losses"]
    for name in ("ones", "cle", "smoothquant", "learned"):
        assert f"{losses[name]:.3f}" in text.split("Gemma 3: best")[1]
    assert min(perplexities("eight_bits/gemma3_w8a8.json", "ptq", 8)) > 1e6


def test_four_bit_weights_are_what_was_measured() -> None:
    text = section(ROOT / "docs" / "bits.md", "Four-bit weights")
    found = rows(text)
    names = METHODS | {"AdaScale": "adascale", "Quadapter, then AdaScale": "quadapter+adascale"}
    assert len(found) == 14
    for name, *cells in found[:9]:
        _, rotated, own = name.rpartition("rotated: ")
        method = "FP behind the prefix" if own == "FP32" else names[own]
        for cell, model in zip(cells, W4A16, strict=True):
            if (name, model) in UNMEASURED:
                assert not cell
                continue
            assert cell == measured(four_bits(model, method, rotated=bool(rotated)), method)
    for name, cell in found[9:]:
        method = "FP behind the prefix" if name == "FP32" else names[name]
        formula = "_formulas" * (method in ("cle", "smoothquant"))
        assert cell == measured(f"four_bits/smollm2_w4a8{formula}.json", method, texts=None)
    for file in W4A16.values():
        choice = recorded(f"four_bits/{file}.json")["choice of α"]
        assert f"{choice['loss']:.2f} ({choice['losses']['ones']:.2f}" in text
    for method in ("ptq", "quadapter"):
        for model in ("qwen2", "gemma3"):
            assert measured(f"four_bits/{model}_w4a8.json", method) in text
    assert measured("four_bits/rotation/smollm2_w4a16_norms4.json", "ptq") in text
    assert measured("four_bits/smollm2_w4a8_norms4.json", "quadapter", texts=None) in text
    for method in ("quadapter", "quadapter+adascale"):
        wider = measured("four_bits/smollm2_w4a16_rotated_norms16.json", method)
        assert wider in text
    wider = "four_bits/qwen2_w4a16_rotated_norms16.json"
    assert measured(wider, "quadapter") in text
    assert f"at a divergence of {recorded(wider)['choice of α']['loss']:.2f}:" in text
    of_three = (ROOT / "docs" / "eight-bits.md").read_text(encoding="utf-8")
    both = "quadapter+adascale"
    for model, rotated in BEST.items():
        ratios = ratio(four_bits(model, both, rotated=rotated), both, 16)
        assert ratios in text
        assert ratios in of_three
    for model in ("smollm2", "qwen2"):
        assert ratio(f"four_bits/{W4A16[model]}.json", "quadapter", 16) in text
    for name, model in (("SmolLM2", "smollm2"), ("Gemma", "gemma3")):
        file = four_bits(model, both, rotated=BEST[model])
        scores = (perplexities(file, m) for m in (both, "adascale"))
        below = [f"{100 * (1 - a / b):.0f}" for a, b in zip(*scores, strict=True)]
        assert f"{' / '.join(below)} % ({name})" in text


W4A16 = {m: f"{m}_w4a16" for m in ("smollm2", "qwen2", "gemma3")}

ADASCALE = {("qwen2", True): "qwen2_w4a16_adascale", ("gemma3", False): "gemma3_w4a16_adascale"}
"""Model, whether rotated → result with AIMET's AdaScale where it is one of its own."""

BEST = {"smollm2": True, "qwen2": True, "gemma3": False}
"""Model → whether it is rotated where it is best with AdaScale behind α."""

UNMEASURED = {
    *((name, "qwen2") for name in ("AdaScale", "Quadapter, then AdaScale", "rotated: AdaScale")),
    *((f"rotated: {name}", "gemma3") for name in ("PTQ", "Quadapter, phase 1")),
    *((f"rotated: {name}", "gemma3") for name in ("AdaScale", "Quadapter, then AdaScale")),
}
"""Line and model of a cell without a result: an hour more, or cannot be turned."""


def four_bits(model: str, method: str, *, rotated: bool) -> str:
    """The result with such a row."""
    own = ADASCALE.get((model, rotated)) if method.endswith("adascale") else None
    return f"four_bits/{own or W4A16[model] + '_rotated' * rotated}.json"


def test_what_a_rotation_costs_weights_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "eight-bits.md", "Whether to rotate"))
    assert [name for name, *_ in found] == list(OF_ROTATION)
    for name, *cells in found:
        for cell, file in zip(cells, OF_ROTATION[name], strict=True):
            assert cell == measured(f"four_bits/{file}.json", "ptq")


OF_ROTATION = {
    "SmolLM2, W4A16": ("smollm2_w4a16", "rotation/smollm2_w4a16_rotated"),
    "SmolLM2, W4A8": ("rotation/smollm2_w4a8", "smollm2_w4a8"),
    "Qwen2.5, W4A16": ("qwen2_w4a16", "rotation/qwen2_w4a16_rotated"),
    "Qwen2.5, W4A8": ("rotation/qwen2_w4a8", "qwen2_w4a8"),
}
"""Line of the table → results of PTQ as the model is, and rotated."""


KEPT = {
    "W8A8, nothing at 16 bits": {
        "smollm2": ("eight_bits/smollm2_w8a8", "eight_bits/smollm2_w8a8_rate", 8),
        "qwen2": ("eight_bits/qwen2_w8a8", "eight_bits/qwen2_w8a8_quadapter", 8),
    },
    "W8A8, residual stream at A16": {
        "smollm2": ("eight_bits/smollm2_w8a8", "eight_bits/smollm2_w8a8", 16),
        "qwen2": ("eight_bits/qwen2_w8a8", "eight_bits/qwen2_w8a8_quadapter", 16),
        "gemma3": ("eight_bits/gemma3_w8a8_stream16", "eight_bits/gemma3_w8a8_stream16", 16),
    },
    "W4A16": {m: (f"four_bits/{f}", f"four_bits/{f}", 16) for m, f in W4A16.items()},
    "W4A8": {m: (f"four_bits/{m}_w4a8",) * 2 + (16 if m == "gemma3" else 8,) for m in W4A16},
}
"""Line of the table → model → results of PTQ and of Quadapter, bits of the residual stream."""


def test_what_three_models_keep_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "eight-bits.md", "Three models"))
    assert [line for line, *_ in found] == list(KEPT)
    for line, *cells in found:
        for cell, model in zip(cells, W4A16, strict=True):
            if model not in KEPT[line]:
                assert cell == "of no use"
                continue
            ptq, quadapter, bits = KEPT[line][model]
            files = {"ptq": ptq, "quadapter": quadapter}
            both = (ratio(f"{file}.json", method, bits) for method, file in files.items())
            assert cell.replace("*", "") == " → ".join(both)


def ratio(file: str, method: str, bits: int, texts: int | None = 2) -> str:
    """Perplexity over the unquantized model's behind the same prefix, on the first texts."""
    over = perplexities(file, method, bits)[:texts]
    under = perplexities(file, "FP behind the prefix")[:texts]
    return " / ".join(f"{a / b:.3f}" for a, b in zip(over, under, strict=True))


VARIANTS = {
    "FP32": "FP",
    "PTQ": "ones",
    "AIMET's SeqMSE": "seqmse",
    "each pair on its own block": "block",
    "all pairs of a layer on its output": "layer",
    "the same, weighted by the curvature of the loss (squared gradients, as BRECQ)": "fisher",
    "the same, on what the quantized layers before it give": "quantized inputs",
}


def test_what_each_part_of_phase_1_buys_is_what_was_measured() -> None:
    folder = "four_bits"
    result = recorded(f"{folder}/smollm2_w4a16_ablation.json")
    divergences, learning = result["divergence"], result["learning"]
    text = section(ROOT / "docs" / "method.md", "What each part buys")
    found = rows(text)
    assert [name for name, *_ in found] == list(VARIANTS)
    for name, divergence, scores, seconds in found:
        variant = VARIANTS[name]
        assert seconds == (f"{learning[variant]:.0f} s" if learning.get(variant) else "")
        own = f"{folder}/smollm2_w4a16_{'seqmse' if variant == 'seqmse' else 'ablation'}.json"
        assert scores == measured(own, variant)
        if variant in divergences:
            assert divergence == f"{divergences[variant]:.3f}"
        else:
            assert not divergence
    for own in ("smollm2_w4a16", "smollm2_w4a16_layers"):
        assert measured(f"{folder}/{own}.json", "quadapter") in text


def test_what_better_scales_could_buy_is_what_was_measured() -> None:
    bounds = recorded("eight_bits/smollm2_w8a8_bounds.json")["bounds"]
    found = rows(section(ROOT / "docs" / "method.md", "What better scales could still buy"))
    assert len(found) == 7
    for name, divergence in found:
        assert divergence == f"{bounds[name]:.3f}"


STEPS = (
    ("eight_bits/smollm2_plain.json", "FP"),
    ("eight_bits/smollm2_prefix.json", "FP behind the prefix"),
    ("eight_bits/smollm2_plain.json", "ptq"),
    ("eight_bits/smollm2_rotated.json", "ptq"),
    ("eight_bits/smollm2_prefix.json", "ptq"),
    (None, "ptq"),
    (None, "cle"),
    (None, "smoothquant"),
    (None, "quadapter"),
    ("eight_bits/smollm2_w8a8_compensated.json", "quadapter"),
    ("eight_bits/smollm2_w8a8_phase2.json", "quadapter + phase 2"),
)
"""Result and row of each line."""


def test_what_a_rotation_and_its_seed_are_worth_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "eight-bits.md", "The rotation"))
    results: dict[str, list[list[float]]] = {"hadamard": [], "random": []}
    for kind, seed, divergence, cell in found:
        file = f"eight_bits/rotations/{kind.strip('`')}_{seed}.json"
        assert recorded(file)["settings"]["rotation_seed"] == int(seed)
        ones = recorded(file)["divergence"]["ones"]
        assert divergence == f"{ones:.3f}"
        assert cell == measured(file, "ones", texts=None)
        results[kind.strip("`")].append([ones, *perplexities(file, "ones")])
    assert [len(of) for of in results.values()] == [3, 3]
    hadamard, random = (list(zip(*of, strict=True)) for of in results.values())
    for one, other in zip(hadamard, random, strict=True):  # the divergence, then each text
        assert statistics.mean(one) < statistics.mean(other)
    assert len({of.index(min(of)) for of in hadamard}) > 1  # no seed is the best on all


STRANGERS = {
    "embedded GPT-2, llm-compressor, W8A8": "embedded_w8a8_llm_compressor",
    "embedded GPT-2, llm-compressor, W4A16": "embedded_w4a16_llm_compressor",
    "embedded GPT-2, auto-round, W4A16": "embedded_w4a16_auto_round",
    "SmolLM2-135M, llm-compressor, W8A8": "smollm2_w8a8_llm_compressor",
    "SmolLM2-135M, llm-compressor, W4A16": "smollm2_w4a16_llm_compressor",
    "SmolLM2-135M, auto-round, W4A16": "smollm2_w4a16_auto_round",
    "SmolLM2-135M, llm-compressor, W4A16, not rotated": "smollm2_w4a16_llm_compressor_unrotated",
    "SmolLM2-135M, auto-round, W4A16, not rotated": "smollm2_w4a16_auto_round_unrotated",
}
"""Row of the page's table → result file."""


def test_what_other_quantizers_gain_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "quantizers.md", "llm-compressor and auto-round"))
    files = ROOT / "benchmarks" / "results" / "strangers"
    assert sorted(STRANGERS[name] for name, *_ in found) == sorted(f.stem for f in files.iterdir())
    for name, *cells in found:
        result = recorded(f"strangers/{STRANGERS[name]}.json")
        before, after = result["original"], result["folded"]
        values = before["fp32"], before["quantized"], after["quantized"]
        assert cells == [f"{value:.2f}" for value in values]
        assert after["fp32"] == pytest.approx(before["fp32"], rel=1e-5)
        if name.endswith("not rotated"):
            assert result["fold"]["recipe"]["rotate"] == "none"


HTP_ROWS = {
    "embedded GPT-2, W8A8": ("embedded_w8a8", None),
    "embedded GPT-2, W8A8, residual A16": ("embedded_w8a8_residual_a16", None),
    "embedded GPT-2, W8A16": ("embedded_w8a16", None),
    "SmolLM2-135M, W8A8, residual A16": ("smollm2_w8a8", "quadapter_a16"),
    "SmolLM2-135M, W8A16": ("smollm2_w8a16", "quadapter_a16"),
}
"""Row of the page's table → result file, and what of it is meant where it holds several."""


@pytest.mark.parametrize("row", HTP_ROWS)
def test_the_htp_table_is_what_was_measured(row: str) -> None:
    name, part = HTP_ROWS[row]
    result = recorded(f"htp/{name}.json")
    if part is None:
        scores, numbers = result["run"]["perplexity"], result["verify"]["numbers"]
        first = (scores["FP32"], scores["Quadapter"])
    else:
        numbers = result["deployed"][part]
        first = (numbers["perplexity without quantizers"],)
    (line,) = re.findall(rf"^\| {row} \|.*$", PAGE.read_text(encoding="utf-8"), re.M)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    four = (*first, *numbers["perplexity"].values())
    assert cells[1] == " / ".join(f"{v:.2f}" for v in four)
    same = numbers["HTP = sim"]
    strict, tied = (same[key] / same["positions"] for key in ("same", "same_or_tie"))
    assert cells[2] == f"{tied:.1%} ({strict:.1%})"
    operations, seconds = numbers["htp"]["operations"], numbers["htp"]["seconds"]
    assert cells[3] == f"{operations} of {operations}"
    assert float(cells[4].removesuffix(" s")) == pytest.approx(seconds, abs=0.51)
    sizes = (numbers["bytes"][name] / 1e6 for name in ("model_qdq.onnx", "model_ctx_qnn.bin"))
    assert cells[5] == " / ".join(f"{size:.1f}" for size in sizes) + " MB"


TIERS = {
    "embedded, `fast`": "tiers/fast.json",
    "embedded, `default`": "tiers/default.json",
    "embedded, `best`": "tiers/best.json",
    "embedded, `paper`": "tiers/paper.json",
    "SmolLM2-135M, `fast`": "eight_bits/smollm2_run_fast.json",
    "SmolLM2-135M, `default`": "eight_bits/smollm2_run.json",
}


def test_what_each_tier_costs_and_gives_is_what_was_measured() -> None:
    found = rows(section(ROOT / "docs" / "tiers.md", "What each costs and gives"))
    assert [name for name, *_ in found] == list(TIERS)
    for name, *cells in found:
        assert cells == tier_cells(TIERS[name])


def test_what_each_tier_is_said_to_do_is_what_it_sets() -> None:
    text = section(ROOT / "docs" / "tiers.md", "Tiers")
    found = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
    assert list(found) == list(TIER_SETTINGS)
    for tier, said in found.items():
        settings = resolve({"tier": tier})
        assert f"{settings.samples} samples" in said
        assert settings.calibration.steps == 40 or f"{settings.calibration.steps} steps" in said
        if "phase 2" in said or "--phase-2" in said:
            assert f"{settings.finetuning.steps:,} steps".replace(",", " ") in said


def tier_cells(file: str) -> list[str]:
    """Seconds and memory, estimated and taken; perplexities, the last where stages follow."""
    run = recorded(file)
    assert f"`{run['recipe']['tier']}`" in next(n for n, f in TIERS.items() if f == file)
    expected, taken = run["estimated"], run["seconds"]
    seconds = [sum(times[s] for s in expected["seconds"]) for times in (expected["seconds"], taken)]
    peaks = [each["peak_bytes"] / 2**30 for each in (expected, run)]
    scores = {stage: of["built-in"] for stage, of in run["perplexity"].items()}
    stages = list(scores)
    last = f"{scores[stages[-1]]:.2f}" if stages[-1] != "Quadapter" else ""
    return [
        " / ".join(f"{value:.0f}" for value in seconds),
        " / ".join(f"{value:.1f}" for value in peaks),
        *(f"{scores[stage]:.2f}" for stage in ("FP32", "PTQ", "Quadapter")),
        last,
    ]


def test_the_bound_of_memory_is_kept_and_said() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", page)
    found = recorded("cost/larger_than_memory.json")
    own = [stage["own"] for stage in found["stages_mib"].values()]
    assert max(own) - found["imported_mib"]["own"] < found["bound_mib"]
    assert found["parameters"] > 2e9
    for figure in (found["model_mib"], found["bound_mib"], 2 * found["parts_mib"]["head"]):
        assert f"{figure:,.0f} MiB".replace(",", " ") in text
    assert f"all {sum(found['pairs'].values())} pairs" in text


def test_the_memory_of_the_proof_is_what_was_measured() -> None:
    text = " ".join((ROOT / "docs" / "aimet.md").read_text(encoding="utf-8").split())
    found = recorded("cost/find_pairs.json")
    grown, largest = found["peak_above_model_mib"], found["largest_module_fp32_mib"]
    assert grown < largest
    assert f"{found['parameters'] / 1e6:.0f} M parameters ({found['model_mib']:.0f} MiB)" in text
    assert f"grew by {grown:.0f} MiB" in text
    assert f"fp32 copy is {largest:.0f} MiB at most" in text
    assert f"torch {found['versions']['torch']})" in text


def test_ranks_have_the_alphas_of_one_process() -> None:
    found = recorded("cost/ranks.json")
    assert found["same to the bit"]
    (one,), (first, second) = found["ranks"].values()
    assert first["pairs"] + second["pairs"] == one["pairs"]
    assert max(first["cpu_seconds"], second["cpu_seconds"]) < 0.75 * one["cpu_seconds"]
    assert found["settings"]["choice"] == "kind"  # its trials are among the seconds
