"""Text that the graphs of `export_generation` write, beside what their sim would say.

    python benchmarks/generation.py --output generation.json

The embedded model, one sim for each choice of bits, its two graphs on the CPU and on the HTP (on
x86 Qualcomm's emulation). Seconds are those of the process, so that work beside it counts less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from torch import Tensor

from aimet_quadapter import (
    Generator,
    apply_quadapter,
    compare_generation,
    default_text,
    export_generation,
    load_default,
    prepare,
    set_residual_bits,
    tokens,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state, versions

CASES: dict[str, tuple[int, int | None]] = {
    "W8A8": (8, None),
    "W8A8, residual stream A16": (8, 16),
    "W8A16": (16, None),
}
"""Name → bits of activations, and of the residual stream where they are others."""

SETTINGS = {
    "model": "embedded GPT-2",
    "config_file": "htp_v73",
    "samples": 4,
    "length": 512,
    "prompt_length": 32,
    "cache_length": 128,
    "htp_arch": "73",
    "prompt_tokens": 24,
    "prompts_every": 512,
    "tokens": 64,
    "seed": 0,
}


def main() -> None:
    """Measure each case on the CPU and on the HTP."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8, help="number of them (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    cases = {name: measured(*bits, args.prompts) for name, bits in CASES.items()}
    record = {
        "settings": SETTINGS | {"prompts": args.prompts},
        "cases": cases,
        "threads": torch.get_num_threads(),
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count()},
        "versions": versions() | {p: version(p) for p in ("onnxruntime", "onnxruntime-qnn")},
        "git": git_state("aimet_quadapter", "benchmarks/generation.py"),
    }
    print(json.dumps(cases, indent=1))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measured(bits: int, residual: int | None, prompts: int) -> dict[str, Any]:
    """What the graphs of one sim write, how far the HTP's logits are off, and sizes of files.

    Args:
        bits: of activations.
        residual: of the residual stream; None for `bits`.
        prompts: number of them.
    """
    s: dict[str, Any] = SETTINGS
    sim, texts = calibrated(bits, residual, prompts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        lengths = {key: s[key] for key in ("prompt_length", "cache_length")}
        export_generation(sim, folder, **lengths)
        cpu = Generator.on_cpu(folder)
        htp = Generator.on_htp(folder, htp_arch=s["htp_arch"], check=False)
        off = htp.check(cpu)
        return {
            "CPU": written(sim, cpu, texts),
            "HTP": written(sim, htp, texts),
            "HTP off by": dict(zip(("prompt graph", "one-token graph"), off, strict=True)),
            "bytes": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
        }


def calibrated(bits: int, residual: int | None, prompts: int) -> tuple[Any, list[list[int]]]:
    """A sim of the embedded model with Quadapter's α folded in, and the prompts' tokens."""
    s: dict[str, Any] = SETTINGS
    torch.manual_seed(s["seed"])
    hf, tokenizer = load_default()
    model = prepare(hf)
    shape = {"config_file": s["config_file"], "default_output_bw": bits}
    sim = QuantizationSimModel(model, model.dummy_input(), **shape)
    if residual:
        set_residual_bits(sim, residual)
    text = tokens(tokenizer, default_text("calibration"), s["samples"] * s["length"])
    apply_quadapter(sim, text.view(s["samples"], 1, s["length"]))
    heldout: Tensor = tokens(tokenizer, default_text("heldout"), prompts * s["prompts_every"])
    rows = heldout.view(prompts, s["prompts_every"])
    return sim, rows[:, : s["prompt_tokens"]].tolist()


def written(sim: Any, generator: Generator, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Texts behind all prompts beside the sim's choice at each of their places.

    Returns:
        Counts of places and of those where it is the sim's choice, of texts that are the sim's,
        the distance in steps of the logits at each other place, and seconds.
    """
    begin = time.process_time()
    found = [generator(prompt, SETTINGS["tokens"]) for prompt in prompts]
    seconds = time.process_time() - begin
    compared = [compare_generation(sim, one) for one in found]
    places = sum(one.tokens for one in compared)
    gaps = [d.gap for one in compared for d in one.differences]
    return {
        "places": places,
        "the sim's choice": places - len(gaps),
        "texts": len(compared),
        "the sim's texts": sum(not one.differences for one in compared),
        "steps of the others": [round(gap, 2) for gap in gaps],
        "all ties": all(one.explained for one in compared),
        "cpu_seconds_per_token": round(seconds / places, 4),
    }


if __name__ == "__main__":
    main()
