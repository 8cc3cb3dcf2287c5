"""Time, memory and steps of phase 1's blocks, by kind of pair. Measures cost, never accuracy.

    python benchmarks/phase1.py                   # the embedded model
    python benchmarks/phase1.py MODEL --pairs 4   # a hub name or folder, 4 pairs of each kind

A time is only worth something beside another taken in the same run: compare kinds, or two settings
with --compare, which alternates them pair by pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel

from aimet_quadapter import CalibrationConfig, calibrate, find_pairs, load_default, prepare
from aimet_quadapter.pairs.pair import Pair

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import peak_memory


def arguments() -> argparse.Namespace:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="hub name or local folder (embedded model)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of each kind")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--compare", type=json.loads, help='other settings, e.g. {"tokens": null}')
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def load(name: str | None) -> Any:
    """The model, prepared."""
    if name is None:
        return prepare(load_default()[0])
    from transformers import AutoModelForCausalLM

    return prepare(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval())


def some_of_each_kind(pairs: Any, count: int) -> list[Pair]:
    """Up to `count` pairs of each kind, spread over the depth of the model."""
    chosen: list[Pair] = []
    for kind in pairs.counts():
        of_kind = list(pairs.select([kind]))
        chosen += of_kind[:: max(len(of_kind) // count, 1)][:count]
    return chosen


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    model = load(args.model)
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="default")
    pairs = some_of_each_kind(find_pairs(sim), args.pairs)
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // args.length, args.length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    blocks = CalibrationConfig(objective="block", choice="block")
    configs = {"default": blocks}
    if args.compare:
        configs["other"] = replace(blocks, **args.compare)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in configs}
    for pair in pairs:
        for name, config in configs.items():
            (result,) = calibrate(sim, [ids], [pair], config).results
            seconds[name].setdefault(pair.kind, []).append(result.seconds)
    peak = peak_memory()
    print(f"{'kind':<16}{'setting':<10}{'pairs':>6}{'steps':>7}{'s/pair':>9}{'ms/step':>9}")
    for kind in seconds["default"]:
        for name, config in configs.items():
            middle = statistics.median(seconds[name][kind])
            count, steps = len(seconds[name][kind]), config.steps
            row = f"{kind:<16}{name:<10}{count:>6}{steps:>7}"
            print(f"{row}{middle:>9.2f}{1000 * middle / max(steps, 1):>9.1f}")
    print(f"peak memory {peak:.2f} GiB, {torch.get_num_threads()} threads, {platform.platform()}")
    if args.output:
        figures = {
            "seconds": seconds,
            "peak_gib": peak,
            "configs": {n: c.to_dict() for n, c in configs.items()},
        }
        args.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
