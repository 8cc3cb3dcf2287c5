"""Write docs/performance.md: what everything costs, from the committed results.

    python docs/write_performance.py

The sentences stand in performance.md.in; each {{ name }} there becomes a table from
`benchmarks/results`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aimet_quadapter.learning.choice import expected_trials

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
    "adascale 1500": "AdaScale, 1 500 iterations",
    "quadapter fast, seqmse": "**Quadapter, `fast`**, then SeqMSE",
    "quadapter fast, adascale 100": "**Quadapter, `fast`**, then AdaScale, 100",
    "spinquant": "SpinQuant",
    "ptq, omniquant's sim": "PTQ of OmniQuant's sim",
    "omniquant 100": "OmniQuant, 100 iterations",
    "omniquant 800": "OmniQuant, 800 iterations",
    "llm-compressor": "llm-compressor",
    "auto-round": "auto-round",
}
"""Method of `benchmarks/peers.py` → as the page has it."""

VARIANTS = {
    "quadapter fast, compiled": "`torch.compile` of the fake quantization",
    "quadapter fast, bfloat16": "products in bf16",
}
"""The same for what might make phase 1 faster."""

MODELS = {
    "embedded": "the embedded GPT-2",
    "smollm2": "SmolLM2-135M",
    "smollm2_3": "SmolLM2-135M's first 3 layers and head",
    "gemma3_3": "Gemma 3 270M's first 3 layers and head",
}


def runs(name: str, bits: str) -> list[dict[str, Any]]:
    """All runs of `benchmarks/peers.py` on a model."""
    files = sorted(RESULTS.glob(f"peers/{name}_{bits}*.json"))
    return [read(f"peers/{file.name}") for file in files]


def compared(name: str, bits: str) -> dict[str, Any]:
    """All runs together; of a method in several the first is taken."""
    found, *others = runs(name, bits)
    for other in others:
        found["summary"] = other["summary"] | found["summary"]
        found["does not run"] = other["does not run"] | found["does not run"]
    return found


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
    found = compared(name, bits)
    summary = found["summary"]
    rows = [[NAMES[m], *cells(m, summary[m])] for m in NAMES if m in summary and m != "fp"]
    fp = summary["fp"]["perplexity"]
    turns = len(found["turns"])
    settings = found["settings"]
    said = (
        f"{bits.upper()}, {MODELS[name]}; {settings['samples']} samples of {settings['length']} "
        f"tokens, {settings['eval_tokens']} to evaluate on, {turns} "
        f"turn{'s' if turns > 1 else ''}. FP32 has a perplexity of {short(fp)}."
    )
    failed = "\n".join(
        f"{NAMES[m]} does not run: `{brief(why)}`." for m, why in found["does not run"].items()
    )
    head = ("method", "seconds", f"over `{BASE.split()[1]}`", "GiB", "divergence", "perplexity")
    return "\n\n".join(filter(None, (said, table(head, rows), failed)))


def brief(error: str) -> str:
    """What an error says, without the lists behind it."""
    return re.split(r"[.,] ?(?:Supported|but)", error)[0].rstrip(": [")


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
    files = {
        "the embedded GPT-2": "gpt2",
        "SmolLM2-135M, 4 layers": "smollm2",
        "Llama 3.2 1B's shape, 2 layers": "llama_1b",
    }
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
                *map(between, over.values()),
            ]
        )
    head = ["varied", "phase 1", "run", "memory"]
    head += [f"estimate of {what} over it" for what in ("phase 1", "the run", "memory")]
    return table(head, rows)


# ---------------------------------------------------------------------- what was left out


def stopped(curve: Sequence[tuple[int, float]]) -> tuple[float, int]:
    """The least error and the steps taken, where two comparisons that bring little are the end.

    Little is a least error that fell by less than 3 %.

    Args:
        curve: (step, error), from the start on.
    """
    errors = [error for _, error in curve]
    for end in range(2, len(errors)):
        if min(errors[: end + 1]) > 0.97 * min(errors[: end - 1]):
            return min(errors[: end + 1]), curve[end][0]
    return min(errors), curve[-1][0]


def early_stop() -> str:
    """What the rule would save and cost, model by model."""
    rows = []
    for name, run in read("cost/early_stop.json").items():
        pairs = run["pairs"]
        ends = [stopped(pair["curve"]) for pair in pairs]
        errors = [e / stopped_never(p["curve"]) for (e, _), p in zip(ends, pairs, strict=True)]
        mean = math.exp(sum(map(math.log, errors)) / len(errors))
        taken = sum(
            pair["seconds"] * steps / pair["curve"][-1][0]
            for pair, (_, steps) in zip(pairs, ends, strict=True)
        )
        share = 100 * taken / sum(pair["seconds"] for pair in pairs)
        worst = max(errors)
        rows.append([name, str(len(pairs)), f"{share:.0f} %", f"{mean:.3f}", f"{worst:.3f}"])
    return table(["model", "pairs", "seconds", "error", "the worst pair's"], rows)


def stopped_never(curve: Sequence[tuple[int, float]]) -> float:
    """The least error of all comparisons."""
    return min(error for _, error in curve)


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
        pairs = [str(rank["pairs"]) for rank in of]
        rows.append([size, " / ".join(pairs), " / ".join(f"{s:.0f}" for s in seconds)])
    return table(["ranks", "pairs of each", "seconds of each"], rows)


def together() -> str:
    """Blocks learned together over one by one, for groups of each size."""
    rows = []
    for name, run in read("cost/together.json").items():
        for size in dict.fromkeys(group["size"] for group in run["groups"]):
            groups = [group for group in run["groups"] if group["size"] == size]
            operations = [group["operations"] for group in groups]
            apart = [group["alpha apart after steps"] for group in groups]
            rows.append(
                [
                    name,
                    str(size),
                    between([group["ratio"]["median"] for group in groups]),
                    between([n["together"] / n["one by one"] for n in operations]),
                    *(f"{max(of[steps] for of in apart):.1g}" for steps in ("1", "40")),
                ]
            )
    head = ["model", "blocks", "seconds", "operations", "α apart after a step", "after 40"]
    return table(head, rows)


def between(values: Sequence[float]) -> str:
    """The least and the most of some ratios."""
    return f"{min(values):.2f}–{max(values):.2f}"


def variants() -> str:
    """What might make phase 1 faster, over `fast` as it is in the same run."""
    rows = []
    for name in measured("w4a16"):
        for variant, said in VARIANTS.items():
            found = next((r["summary"] for r in runs(name, "w4a16") if variant in r["summary"]), {})
            if found:
                over = [
                    f"{found[variant][what] / found['quadapter fast'][what]:.2f}"
                    for what in ("cpu_seconds", "divergence")
                ]
                rows.append([MODELS[name], said, *over])
    return table(["W4A16", "", "seconds", "divergence"], rows)


def divided(name: str, bits: str, method: str, other: str, what: str = "cpu_seconds") -> str:
    """What a method takes or loses over another one on a model."""
    found = compared(name, bits)["summary"]
    ratio = found[method][what] / found[other][what]
    return f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 2 else 2}f}"


@dataclass(frozen=True)
class OnPaper:
    """Phase 1 of a Llama of 70 G parameters, from counts and assumed rates; nothing is measured.

    A product of t tokens with p weights is 2tp operations, with its two gradients 6tp. Weights of
    a block are read and written by the division by α, fake quantization and their gradients.

    Attributes:
        layers, width, ffn, kv, vocabulary: the shape.
        tokens, text, held: of a step with its extremes; of all samples; that are held back.
        steps, errors, candidates: of a pair; comparisons of its error; what the choice is among.
        passes, quantized: through a block's weights a step; through all weights a trial.
        fp32, bf16: operations a second, about half and a third of an H100's nominal ones.
        memory, disk, copied: bytes a second; the last of the copy that the choice folds from.
    """

    layers: int = 80
    width: int = 8192
    ffn: int = 28_672
    kv: int = 1024
    vocabulary: int = 128_256
    tokens: int = 280
    text: int = 8 * 512
    held: int = 512
    steps: int = 40
    errors: int = 8
    candidates: int = 5
    passes: int = 16
    quantized: int = 12
    fp32: float = 30e12
    bf16: float = 300e12
    memory: float = 2e12
    disk: float = 2e9
    copied: float = 10e9

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Weights of q or o, of k or v, of gate, up or down."""
        return self.width**2, self.width * self.kv, self.width * self.ffn

    @property
    def parameters(self) -> int:
        """Of the model."""
        square, kv, ffn = self.sizes
        layer = 2 * square + 2 * kv + 3 * ffn
        return self.layers * layer + 2 * self.vocabulary * self.width

    @property
    def pairs(self) -> list[int]:
        """Weights of each block: norm → q, k, v; v → o; norm → gate, up; up → down."""
        square, kv, ffn = self.sizes
        return [square + 2 * kv, kv + square, 2 * ffn, 2 * ffn] * self.layers

    def learning(self, processes: int) -> float:
        """Seconds of the dearest rank: pairs in order, as even as whole pairs can be."""
        each = [self.of_pair(weights) for weights in self.pairs]
        return max(sum(each) / processes, max(each))

    def of_pair(self, weights: int) -> float:
        """Seconds of a pair."""
        products = 6 * self.tokens * self.steps + 2 * self.text * (1 + self.errors / 2)
        moved = 4 * self.passes * (self.steps + self.errors / 2)
        return weights * (products / self.fp32 + moved / self.memory)

    def stages(self, processes: int) -> dict[str, float]:
        """Seconds of reading, capture, learning, the choice and its copy of the weights."""
        kinds = dict.fromkeys(("norm-qkv", "v-o", "norm-mlp", "up-down"), self.layers)
        own, composed = expected_trials(kinds, self.candidates, False, processes)
        passed = self.held * (composed + 3 * own)  # two samples for ranges
        return {
            "read": 2 * self.parameters / self.disk,
            "capture": 2 * self.text * self.parameters / self.bf16,
            "learn": self.learning(processes),
            "choose": self.parameters
            * (2 * passed / self.bf16 + 2 * self.quantized * (own + composed) / self.memory),
            # Written, read whole for an own trial and by halves for another, read at the end.
            "copy": 2 * self.parameters / self.copied * (1 + own + composed / 2 + 1),
        }


def on_paper() -> str:
    """Phase 1 of a large model on several GPUs."""
    model = OnPaper()
    rows = []
    for processes in (1, 8, 64):
        seconds = model.stages(processes)
        values = [*seconds.values(), sum(seconds.values())]
        rows.append([str(processes), *(f"{value:.0f}" for value in values)])
    return table(["GPUs", *model.stages(1), "seconds together"], rows)


def ahead() -> str:
    """The peer that loses least on each model, and what Quadapter takes to lose no more."""
    rows = []
    for bits in SHOWN:
        for name in measured(bits):
            found = compared(name, bits)["summary"]
            scored = {m: found[m] for m in COMPARED if "divergence" in found.get(m, {})}
            own = [m for m in scored if "quadapter" in m]
            peer = min((m for m in scored if m not in own), key=lambda m: lost(scored, m))
            leanest = min(one["peak_bytes"] for one in scored.values())
            rows.append(
                [
                    f"{MODELS[name]}, {bits.upper()}",
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


COMPARED = [m for m in NAMES if m not in ("fp", "ptq", "ptq, omniquant's sim")]

SHOWN = {
    "w8a8": ("embedded", "smollm2", "gemma3_3"),
    "w4a16": ("embedded", "smollm2", "smollm2_3", "gemma3_3"),
}
"""Bits → the models whose methods are all on the page."""

FAST, SEQMSE, ADASCALE = "quadapter fast", "seqmse", "adascale 100"
RATIOS = {
    "loss of AdaScale": ("embedded", "w4a16", "adascale 1500", FAST, "divergence"),
    "time of AdaScale": ("embedded", "w4a16", "adascale 1500", FAST),
    "AdaScale, whole": ("smollm2", "w4a16", ADASCALE, FAST),
    "SeqMSE, whole": ("smollm2", "w4a16", SEQMSE, FAST),
    "SeqMSE, 3 layers": ("smollm2_3", "w4a16", SEQMSE, FAST),
    "loss of SeqMSE, whole": ("smollm2", "w4a16", SEQMSE, FAST, "divergence"),
    "loss of both": ("smollm2", "w4a16", f"{FAST}, {ADASCALE}", ADASCALE, "divergence"),
    "time of both": ("smollm2", "w4a16", f"{FAST}, {ADASCALE}", ADASCALE),
    "default, 8 bits": ("smollm2", "w8a8", BASE, FAST, "divergence"),
    "default, 4 bits": ("smollm2", "w4a16", BASE, FAST, "divergence"),
    "time of default": ("smollm2", "w8a8", BASE, FAST),
}
"""Word of the text → what is divided there."""


def page() -> str:
    """The page."""
    text = TEXT.read_text(encoding="utf-8")
    tables = {
        "ahead": ahead,
        "phase 2": phase_2,
        "growth": growth,
        "larger than memory": larger_than_memory,
        "ranks": ranks,
        "on paper": on_paper,
        "variants": variants,
        **{name: partial(divided, *what) for name, what in RATIOS.items()},
        "early stop": early_stop,
        "together": together,
        **{bits: partial(of_all_models, bits) for bits in SHOWN},
    }
    return re.sub(r"\{\{ (.+?) \}\}", lambda found: tables[found[1]](), text)


def of_all_models(bits: str) -> str:
    """The methods on each model that is shown."""
    return "\n\n".join(peers(name, bits) for name in SHOWN[bits])


def measured(bits: str) -> list[str]:
    """The models that were."""
    return [name for name in MODELS if (RESULTS / "peers" / f"{name}_{bits}.json").exists()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
