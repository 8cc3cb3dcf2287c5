"""Time of a step of phase 2 beside one of ordinary fine-tuning. Measures cost, never accuracy.

    python benchmarks/phase2.py                      # the embedded GPT-2
    python benchmarks/phase2.py FOLDER --layers 4    # the first 4 layers of a model, with its head
    python benchmarks/phase2.py llama-3.2-1b --layers 2    # that shape with random weights

Unquantized, all weights trained by Adam ("training"), or its vectors alone ("vectors"); `finetune`
as it is, with `lr_ranges` 0 and with distillation, and each of the three with AIMET's own kernels
on whole weights ("aimet …"). They take turns; seconds are those of the processor, so that work
beside it counts less, and a ratio is taken within a turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import patch_attr
from peers import ready

from aimet_quadapter import FinetuneConfig, find_pairs, finetune, load_default, prepare, set_ranges
from aimet_quadapter.learning import finetuning
from aimet_quadapter.pairs.attachment import detach

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state, peak_memory, versions

SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "finetune, ranges fixed": {"lr_ranges": 0.0},
    "finetune, distillation": {"loss": "distillation"},
}
STEPS = 3


def arguments() -> argparse.Namespace:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="local folder or shape (embedded model)")
    parser.add_argument("--layers", type=int, help="keep the first layers alone")
    parser.add_argument("--batch", type=int, default=1, help="texts of a step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a text")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def load(name: str | None, layers: int | None) -> Any:
    """The model, prepared."""
    if name is None:
        return prepare(load_default()[0])
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        made = ready(name, layers, Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    return prepare(model.eval())


def plain(model: Any, ids: torch.Tensor, vectors: bool) -> float:
    """Seconds of one step of the unquantized model, after one that is not counted."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1 or not vectors)
    # A rate so small that the weights stay what they are, at the cost of any other.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-12)
    for _ in range(2):
        begin = time.process_time()
        output = model(ids)
        logits = output[0] if isinstance(output, tuple) else output
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - begin
    return seconds


def ours(sim: Any, ids: torch.Tensor, pairs: Any, changes: dict[str, Any], aimet: bool) -> float:
    """Seconds of a step of `finetune`, the first one not counted."""
    times: list[float] = []
    config = FinetuneConfig(steps=STEPS, **changes)
    whole = patch_attr(finetuning, "_same_for_less", lambda *_: nullcontext())
    with whole if aimet else nullcontext():
        finetune(sim, [ids], pairs, None, config, None, lambda _: times.append(time.process_time()))
    detach(sim)
    return statistics.median(b - a for a, b in pairwise(times[1:]))


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    model = load(args.model, args.layers)
    sim = QuantizationSimModel(copy.deepcopy(model), model.dummy_input(), config_file="default")
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, args.tokens)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    set_ranges(sim, [ids])
    pairs = find_pairs(sim)
    cases: dict[str, Callable[[], float]] = {
        "training": lambda: plain(model, ids, False),
        "vectors": lambda: plain(model, ids, True),
    }
    for name, changes in SETTINGS.items():
        cases[f"aimet {name}"] = lambda c=changes: ours(sim, ids, pairs, c, True)
        cases[name] = lambda c=changes: ours(sim, ids, pairs, c, False)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.turns):
        for name, run in cases.items():
            seconds[name].append(run())
    ratios = {}
    for name, values in seconds.items():
        each = [b / a for a, b in zip(seconds["training"], values, strict=True)]
        ratios[name] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
        spread = "{median:5.2f} ({least:.2f} to {most:.2f})".format(**ratios[name])
        print(f"{name:<32}{1000 * statistics.median(values):>9.1f} ms {spread}")
    if args.output:
        figures = {
            "model": Path(args.model).name if args.model else "embedded GPT-2",
            "layers": args.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "pairs": len(pairs),
            "quantizers": len(list(sim.quantizers())),
            "batch": args.batch,
            "tokens": args.tokens,
            "ratio to training": ratios,
            "processor seconds": seconds,
            "peak_gib": peak_memory(),
            "seed": 0,
            "threads": torch.get_num_threads(),
            "git": git_state("aimet_quadapter", "benchmarks/phase2.py"),
            "versions": versions(),
        }
        args.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
