"""How what a run takes grows with layers, width, tokens and vocabulary, and how it was estimated.

    python benchmarks/growth.py          # 13 random Llamas; OMP_NUM_THREADS=1
    python benchmarks/growth.py --draw   # docs/performance.svg, from what was measured

Each is a `quadapter run` of its own, with seconds of the process: with one thread they are what the
clock shows on an idle machine. One thing is varied at a time. An exponent is the slope of the
logarithms over all points of a line; what does not grow makes it smaller where models are small.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiers import ROOT, measured

from aimet_quadapter import load_default
from aimet_quadapter.results.plots import Series, lines

RESULT = ROOT / "benchmarks" / "results" / "cost" / "growth.json"
PLOT = ROOT / "docs" / "performance.svg"
BASE = {"layers": 4, "width": 256, "tokens": 2048, "vocabulary": 8192}
LINES = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 768),
    "tokens": (1024, 2048, 4096, 8192),
    "vocabulary": (4096, 8192, 32_768, 131_072),
}
"""What is varied → its values; the rest is that of `BASE`."""

LENGTH = 256
"""Tokens of a sample."""

PHASE_1 = "quadapter"
"""Stage of a run."""

APART = ("load", "preflight")
"""Stages that the estimate does not have."""


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help=f"write {PLOT.name} and end")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=[*LINES], help="some of them")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file (%(default)s)")
    args = parser.parse_args()
    if not args.draw:
        runs = measure(args.lines)
        record = {"base": BASE, "length": LENGTH, "exponents": exponents(runs), "runs": runs}
        args.result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(args.result.read_text(encoding="utf-8"))
    PLOT.write_text(drawn(record["runs"]), encoding="utf-8")


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """A run for each point of these lines; the point that they share is measured once."""
    shapes = [BASE | {name: value} for name in names for value in LINES[name]]
    found = []
    for shape in [one for place, one in enumerate(shapes) if one not in shapes[:place]]:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--samples", str(shape["tokens"] // LENGTH), "--length", str(LENGTH)]
            options += ["--eval-tokens", "1024"]
            run = measured("default", [random_llama(Path(folder), shape), *options], cpu_time=True)
        found.append({"shape": shape, **costs(run)})
        print(json.dumps(shape | found[-1]["over"]), flush=True)
    return found


def random_llama(folder: Path, shape: Mapping[str, int]) -> str:
    """A Llama with random weights and the embedded model's tokenizer, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = shape["width"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=shape["layers"],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2 * LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_default()[1].save_pretrained(folder)
    return str(folder)


def costs(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was estimated to take and took, and the estimates over that."""
    took = {stage: s for stage, s in run["seconds"].items() if stage not in APART}
    expected = run["estimated"]["seconds"]
    over = {
        "phase 1": expected[PHASE_1] / took[PHASE_1],
        "run": sum(expected.values()) / sum(took.values()),
        "memory": run["estimated"]["peak_bytes"] / run["peak_bytes"],
    }
    return {
        "seconds": took,
        "peak_bytes": run["peak_bytes"],
        "estimated": run["estimated"],
        "over": {name: round(value, 3) for name, value in over.items()},
        "versions": run["versions"],
        "stamp": run["stamp"],
    }


def of_line(runs: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The runs that differ from `BASE` in one thing alone."""
    return [r for r in runs if BASE | {name: r["shape"][name]} == r["shape"]]


def exponents(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What is varied → the exponent of phase 1's seconds, the run's, and the largest memory."""
    found = {}
    for name in LINES:
        points = of_line(runs, name)
        if len(points) > 1:
            x = np.log([r["shape"][name] for r in points])
            y = {
                "phase 1": [r["seconds"][PHASE_1] for r in points],
                "run": [sum(r["seconds"].values()) for r in points],
                "memory": [r["peak_bytes"] for r in points],
            }
            found[name] = {k: round(float(np.polyfit(x, np.log(v), 1)[0]), 2) for k, v in y.items()}
    return found


def drawn(runs: Sequence[Mapping[str, Any]]) -> str:
    """Phase 1's seconds over those of the common point, for each line."""
    (base,) = (r for r in runs if r["shape"] == BASE)
    series = []
    for place, name in enumerate(LINES):
        points = sorted(of_line(runs, name), key=lambda r, name=name: r["shape"][name])
        x = [r["shape"][name] / BASE[name] for r in points]
        y = [r["seconds"][PHASE_1] / base["seconds"][PHASE_1] for r in points]
        series.append(Series(name, place, x, y))
    return lines("What phase 1 takes", series, "times as much", "times the seconds", log_x=True)


if __name__ == "__main__":
    sys.exit(main())
