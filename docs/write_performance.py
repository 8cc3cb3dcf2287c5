"""Write docs/performance.md: what everything costs, from the committed results.

    python docs/write_performance.py

The sentences stand in performance.md.in; each {{ name }} there becomes a table from
`benchmarks/results`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("performance.md")
TEXT = Path(__file__).with_name("performance.md.in")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BASE = "quadapter default"

NAMES = {
    "fp": "FP32",
    "ptq": "PTQ",
    "cle": "CLE",
    "smoothquant": "SmoothQuant 0.5",
    "quadapter fast": "**Quadapter, `fast`**",
    "quadapter default": "**Quadapter, `default`**",
    "quadapter best": "**Quadapter, `best`**",
    "seqmse": "SeqMSE",
    "adascale 100": "AdaScale, 100 iterations",
    "quadapter fast, adascale 100": "**Quadapter, `fast`**, then AdaScale, 100",
    "spinquant": "SpinQuant",
    "ptq, omniquant's sim": "PTQ of OmniQuant's sim",
    "omniquant 100": "OmniQuant, 100 iterations",
    "llm-compressor": "llm-compressor",
    "auto-round": "auto-round",
}
"""Method of `benchmarks/peers.py` → as the page has it."""

MODELS = {
    "embedded": "the embedded GPT-2",
    "smollm2_3": "SmolLM2-135M, its first 3 layers and head",
    "gemma3_3": "Gemma 3 270M, its first 3 layers and head",
}


def read(file: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first hold numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peers(name: str, bits: str) -> str:
    """The methods on one model, with those that do not run."""
    found = read(f"peers/{name}_{bits}.json")
    summary = found["summary"]
    rows = [[NAMES[m], *cells(m, summary[m])] for m in summary if m != "fp"]
    fp = summary["fp"]["perplexity"]
    turns = len(found["turns"])
    settings = found["settings"]
    said = (
        f"{bits.upper()}, {MODELS[name]}; {settings['samples']} samples of {settings['length']} "
        f"tokens, {settings['eval_tokens']} to evaluate on, {turns} "
        f"turn{'s' if turns > 1 else ''}. FP32 has a perplexity of {short(fp)}."
    )
    failed = "\n".join(
        f"{NAMES[m]} does not run: `{why.rstrip(': [')}`."
        for m, why in found["does not run"].items()
    )
    head = ("method", "seconds", f"over `{BASE.split()[1]}`", "GiB", "divergence", "perplexity")
    return "\n\n".join(filter(None, (said, table(head, rows), failed)))


def cells(method: str, found: Mapping[str, Any]) -> list[str]:
    """Seconds, their ratio with its spread, memory, divergence, perplexity of a method."""
    over = found.get(f"cpu_seconds over {BASE}")
    ratio = ""
    if over is not None and method != BASE:
        ratio = f"{over['median']:.2f}"
        if over["most"] > over["least"]:
            ratio += f" ({over['least']:.2f}–{over['most']:.2f})"
    divergence = f"{found['divergence']:.2g}" if "divergence" in found else ""
    return [
        f"{found['cpu_seconds']:.1f}",
        ratio,
        f"{found['peak_bytes'] / 2**30:.2f}",
        divergence,
        short(found["perplexity"]),
    ]


def short(value: float) -> str:
    """A perplexity; of a model that says nothing its order."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def phase_2() -> str:
    """A step of phase 2 over one of training."""
    files = {"the embedded GPT-2": "gpt2", "SmolLM2-135M, 4 layers": "smollm2"}
    results = {name: read(f"cost/phase2_{file}.json") for name, file in files.items()}
    cases = {
        "finetune": "`finetune`",
        "finetune, ranges fixed": "`lr_ranges=0`",
        "finetune, distillation": '`loss="distillation"`',
    }
    rows = []
    for case, label in cases.items():
        row = [label]
        for result in results.values():
            ratios = result["ratio to training"]
            row += [f"{ratios[f'aimet {case}']['median']:.2f}", f"{ratios[case]['median']:.2f}"]
        rows.append(row)
    head = [""] + [f"{name}, {which}" for name in results for which in ("AIMET's", "now")]
    return table(head, rows)


def growth() -> str:
    """Exponents, and how well runs were estimated."""
    found = read("cost/growth.json")
    runs = found["runs"]
    rows = []
    for name, exponents in found["exponents"].items():
        points = [r for r in runs if found["base"] | {name: r["shape"][name]} == r["shape"]]
        values = sorted(r["shape"][name] for r in points)
        over = {what: [r["over"][what] for r in points] for what in ("phase 1", "run", "memory")}
        rows.append(
            [
                f"{name}, {values[0]} to {values[-1]}",
                *(f"{exponents[what]:.2f}" for what in over),
                *(f"{min(of):.2f}–{max(of):.2f}" for of in over.values()),
            ]
        )
    head = ["varied", "phase 1", "run", "memory"]
    head += [f"estimate of {what} over it" for what in ("phase 1", "the run", "memory")]
    return table(head, rows)


# ---------------------------------------------------------------------- what was left out


def low(pair: Mapping[str, Any], stop: Callable[[Sequence[float]], bool]) -> tuple[float, float]:
    """Error that a pair keeps, and its seconds, where comparisons end when `stop` says so.

    Args:
        pair: of `early_stop.json`.
        stop: is given the errors from the best start on.
    """
    starts = list(pair["starts"].values())
    seconds, seen, kept = pair["seconds before"], [min(starts)], math.inf
    best = math.inf
    for one in pair["comparisons"]:
        seconds += one["seconds of steps"] + one["seconds"]
        seen.append(one["learned"])
        if one["learned"] < best:
            best, kept = one["learned"], one["halfway"]
        if stop(seen):
            break
    return min(best, kept, *starts), seconds + one["seconds"]


def two_bring_little(seen: Sequence[float]) -> bool:
    """Whether the last two comparisons lowered the least error by less than 3 %."""
    return len(seen) > 2 and min(seen) > 0.97 * min(seen[:-2])


def early_stop() -> str:
    """What the rule would save and cost, model by model."""
    rows = []
    for name, run in read("cost/early_stop.json")["runs"].items():
        both = [(low(p, two_bring_little), low(p, lambda _: False)) for p in run["pairs"]]
        errors = [stopped[0] / whole[0] for stopped, whole in both]
        mean = math.exp(sum(map(math.log, errors)) / len(errors))
        share = sum(s[1] for s, _ in both) / sum(w[1] for _, w in both)
        rows.append(
            [name, str(len(both)), f"{100 * share:.0f} %", f"{mean:.3f}", f"{max(errors):.3f}"]
        )
    return table(["model", "pairs", "seconds", "error", "the worst pair's"], rows)


def larger_than_memory() -> str:
    """Memory and seconds of each stage."""
    found = read("cost/larger_than_memory.json")
    stages, imports = found["stages_mib"], found["imported_mib"]["own"]
    rows = {
        "the process's own, above its imports": [s["own"] - imports for s in stages.values()],
        "with the checkpoint's pages, imports too": [s["all"] for s in stages.values()],
        "seconds": [s["seconds"] for s in stages.values()],
    }
    cells = [[name, *(f"{value:.0f}" for value in values)] for name, values in rows.items()]
    return table(["MiB", *stages], cells)


def ranks() -> str:
    """What each rank learns, and its seconds."""
    found = read("cost/ranks.json")
    rows = []
    for size, of in found["ranks"].items():
        seconds = [rank["cpu_seconds"] for rank in of]
        pairs = [rank["pairs"] for rank in of]
        rows.append([size, together(pairs), " / ".join(f"{s:.0f}" for s in seconds)])
    return table(["ranks", "pairs of each", "seconds of each"], rows)


def together(values: Sequence[int]) -> str:
    """Numbers with a stroke between."""
    return " / ".join(map(str, values))


def ahead() -> str:
    """The peer that loses least on each model, and what Quadapter takes to lose no more."""
    rows = []
    for bits in BITS:
        for name in measured(bits):
            found = read(f"peers/{name}_{bits}.json")["summary"]
            scored = {m: s for m, s in found.items() if "divergence" in s and m not in NEITHER}
            own = [m for m in scored if "quadapter" in m]
            peer = min((m for m in scored if m not in own), key=lambda m: lost(scored, m))
            leanest = min(one["peak_bytes"] for one in scored.values())
            rows.append(
                [
                    f"{MODELS[name].split(',')[0]}, {bits.upper()}",
                    f"{NAMES[peer]} {lost(scored, peer):.2g}",
                    *no_worse(scored, own, peer),
                    f"{max(scored[m]['peak_bytes'] for m in own) / leanest:.2f}",
                ]
            )
    head = ["", "the best peer", "the cheapest of ours that loses no more", "seconds over its"]
    return table([*head, "memory of ours over the leanest"], rows)


def lost(scored: Mapping[str, Any], method: str) -> float:
    """Divergence of a method."""
    return float(scored[method]["divergence"])


def no_worse(scored: Mapping[str, Any], own: Sequence[str], peer: str) -> list[str]:
    """The cheapest of ours that loses no more than a peer, or the best; its seconds over its."""
    good = [m for m in own if lost(scored, m) <= lost(scored, peer)]
    if good:
        chosen = min(good, key=lambda m: scored[m]["cpu_seconds"])
        said = f"{NAMES[chosen]} {lost(scored, chosen):.2g}"
    else:
        chosen = min(own, key=lambda m: lost(scored, m))
        said = f"none; the best is {NAMES[chosen]} {lost(scored, chosen):.2g}"
    return [said, f"{scored[chosen]['cpu_seconds'] / scored[peer]['cpu_seconds']:.2f}"]


BITS = {"w8a8": "8-bit weights and activations", "w4a16": "4-bit weights, 16-bit activations"}
NEITHER = ("fp", "ptq", "ptq, omniquant's sim")


def page() -> str:
    """The page."""
    text = TEXT.read_text(encoding="utf-8")
    tables = {
        "ahead": ahead,
        "phase 2": phase_2,
        "growth": growth,
        "larger than memory": larger_than_memory,
        "ranks": ranks,
        "early stop": early_stop,
        **{bits: partial(of_all_models, bits) for bits in BITS},
    }
    return re.sub(r"\{\{ (.+?) \}\}", lambda found: tables[found[1]](), text)


def of_all_models(bits: str) -> str:
    """The methods on each model."""
    return "\n\n".join(peers(name, bits) for name in measured(bits))


def measured(bits: str) -> list[str]:
    """The models that were."""
    return [name for name in MODELS if (RESULTS / "peers" / f"{name}_{bits}.json").exists()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
