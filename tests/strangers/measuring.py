"""What each program for another environment does alike: tokens, perplexity, versions.

Runs without aimet_quadapter: between the two environments there are files only.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D


def arguments(doc: str, schemes: list[str]) -> argparse.Namespace:
    """What a program is given by `benchmarks/strangers.py`."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("folder", type=Path, help="HuggingFace checkpoint")
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--evaluation-text", type=Path, required=True)
    parser.add_argument("--scheme", choices=schemes, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to be written")
    return parser.parse_args()


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32, each Conv1D exchanged for an equal Linear, and its tokenizer.

    A Conv1D (GPT-2) is a Linear whose weight lies the other way. Quantizers that go by the name of
    the class pass it over.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(*module.weight.shape)
        linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
        model.set_submodule(name, linear)
    return model, AutoTokenizer.from_pretrained(folder)


def rows(tokenizer: Any, file: Path, count: int, length: int) -> Tensor:
    """The first tokens of a text, (count, length)."""
    text = file.read_text(encoding="utf-8")[: 40 * count * length]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    return ids[0, : count * length].reshape(count, length)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Exponential of the mean loss of every token of each window but its first."""
    losses = [model(w[None], labels=w[None], use_cache=False).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses))


class Measured:
    """What a context takes: seconds by the clock and of all cores, the largest resident size."""

    def __enter__(self) -> Measured:
        self.begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.found = {
            "seconds": time.perf_counter() - self.begin[0],
            "cpu_seconds": time.process_time() - self.begin[1],
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def write(file: Path, packages: list[str], **found: Any) -> None:
    """The result, with the versions of what gave it."""
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    record = {**found, "versions": versions}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
