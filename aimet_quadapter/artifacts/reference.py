"""What `export` leaves behind so that the folder alone can be checked: inputs and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import DataError
from .manifest import REFERENCE

POSITIONS = 64
"""Positions whose logits are kept, evenly spread: bounds the file at 128 rows of the vocabulary."""


@dataclass(frozen=True)
class Reference:
    """Inputs, and what torch computed from them when the folder was written.

    Attributes:
        inputs: name in the ONNX files → tensor.
        positions: (P,), into the B·T positions of the output.
        fp: logits of the sim without activation quantizers, (P, V): what `model.onnx` holds.
        sim: logits of the sim, (P, V): what `model_qdq.onnx` holds.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    fp: Tensor
    sim: Tensor

    def rows(self, logits: Tensor) -> Tensor:
        """The kept positions of logits (B, T, V): (P, V)."""
        return logits.reshape(-1, logits.shape[-1])[self.positions]


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
    """Run the sim with and without its activation quantizers and keep logits of both."""
    from aimet_torch.utils import in_eval_mode, remove_activation_quantizers  # reading needs none

    with torch.no_grad(), in_eval_mode(sim.model):
        quantized = sim.model(*args)
        with remove_activation_quantizers(sim.model):
            fp = sim.model(*args)
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


def read_reference(folder: Path) -> Reference:
    """Read what `write_reference` wrote.

    Raises:
        DataError: it is not there, or not whole.
    """
    file = folder / REFERENCE
    try:
        tensors = load_file(file)
        inputs = {k.removeprefix("input."): v for k, v in tensors.items() if "input." in k}
        return Reference(inputs, tensors["positions"], tensors["fp"], tensors["sim"])
    except (FileNotFoundError, SafetensorError, KeyError) as e:
        raise DataError(
            f"{folder} has no usable {REFERENCE} ({e}): nothing says what the model should "
            "compute. Export again with this version."
        ) from e
