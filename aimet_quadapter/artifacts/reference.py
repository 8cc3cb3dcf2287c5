"""Inputs in the folder of an export and their logits, so that the folder alone can be checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError
from .manifest import REFERENCE


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


def read_reference(folder: Path) -> Reference:
    """Read what `export` left for this.

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
