"""What `export` leaves behind so that the folder alone can be checked: inputs and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_activation_quantizers
from safetensors.torch import save
from torch import Tensor

from ..artifacts.manifest import REFERENCE
from ..errors import DataError
from ..sim.kernels import vectorized
from ..sim.outputs import logits_place, tensors_in

POSITIONS = 64
"""Positions whose logits are kept, evenly spread: bounds the file at 128 rows of the vocabulary."""


def check_reference(given: Sequence[Tensor | None], args: Sequence[Tensor | None]) -> None:
    """Raise DataError unless the reference inputs have the shapes and types of the files."""
    shapes = [[x if x is None else (*x.shape, x.dtype) for x in these] for these in (given, args)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"reference is {shapes[0]}, dummy_input {shapes[1]}: the files take one shape. Give "
            "both the same, or leave reference out."
        )


def write_reference(
    sim: Any, args: Sequence[Tensor | None], names: Sequence[str], folder: Path
) -> None:
    """Run the sim with and without its activation quantizers and keep logits of both.

    Of several outputs the logits count.
    """
    with torch.no_grad(), in_eval_mode(sim.model), vectorized():
        outputs = tensors_in(sim.model(*args))
        place = logits_place(outputs, sim.model) or 0
        quantized = outputs[place]
        with remove_activation_quantizers(sim.model):
            fp = tensors_in(sim.model(*args))[place]
    count = quantized.shape[:-1].numel()
    positions = torch.linspace(0, count - 1, min(POSITIONS, count)).round().long()
    tensors = {
        "positions": positions,
        "fp": fp.reshape(count, -1).cpu()[positions].float(),
        "sim": quantized.reshape(count, -1).cpu()[positions].float(),
    }
    for name, x in zip(names, args, strict=True):
        if x is not None:
            tensors[f"input.{name}"] = x.cpu().contiguous()
    (folder / REFERENCE).write_bytes(save(tensors))
