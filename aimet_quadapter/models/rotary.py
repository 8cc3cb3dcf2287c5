"""Rotary positions (Su et al., 2021): two products and a sum, and the tables they read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from aimet_torch.nn.modules.custom import Add, Multiply
from torch import Tensor, nn

from ..errors import UnsupportedModelError


class Rotary(nn.Module):
    """x · cos + half-rotated x · sin.

    HuggingFace negates half of x; here the sign lies in the table of sines, which is equal and
    leaves two products and one sum to quantize, and only data movement between them. Channels of a
    head that are not rotated have cos = 1 and sin = 0: a head is never taken apart, whose two parts
    would have two encodings.

    Args:
        size: channels R that are rotated, the first ones.
        head_size: channels D of a head.
    """

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.size = size
        self.partial = size < head_size
        self.mul_cos = Multiply()
        self.mul_sin = Multiply()
        self.add = Add()

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        half = self.size // 2
        parts = [x[..., half : self.size], x[..., :half]]
        if self.partial:
            parts.append(x[..., self.size :])
        swapped = torch.cat(parts, dim=-1)  # (B, H, T, D)
        rotated: Tensor = self.add(self.mul_cos(x, cos), self.mul_sin(swapped, signed_sin))
        return rotated


def rotary_tables(
    module: Any, name: str, positions: int, size: int, head_size: int
) -> tuple[Tensor, Tensor]:
    """Cos and signed sin, (positions, head_size) each in fp32, from HuggingFace's own module.

    Args:
        module: gives cosines and sines of positions, in either order, of half or all channels.
        name: passed on where the module keeps several tables (`layer_type`).
        positions: how many.
        size: channels that are rotated.
        head_size: channels of a head.

    Raises:
        UnsupportedModelError: it does not.
    """
    device = next((b.device for b in module.buffers()), None)
    ids = torch.arange(positions, device=device)[None]
    takes = inspect.signature(module.forward).parameters
    extra = {"layer_type": name} if "layer_type" in takes else {}
    like = torch.zeros(1, dtype=torch.float32, device=device)
    try:
        tables = [t[0].float() for t in module(like, position_ids=ids, **extra)]
    except (KeyError, AttributeError, TypeError) as e:
        raise UnsupportedModelError(
            f"{type(module).__name__} gives no tables of the name {name!r}: {e!r}."
        ) from e
    cos, sin = sorted(tables, key=lambda t: bool((t[0] == 0).all()))  # the sine of 0 is 0
    if cos.shape == (positions, size):
        pairs = torch.equal(cos[:, ::2], cos[:, 1::2])  # neighbours have one angle
        half = (slice(None), slice(None, None, 2) if pairs else slice(size // 2))
        cos, sin = cos[half], sin[half]
    if cos.shape != (positions, size // 2):
        raise UnsupportedModelError(
            f"{type(module).__name__} gives tables of {tuple(cos.shape)} where "
            f"{(positions, size)} were expected: other channels are rotated than described."
        )
    rest = cos.new_ones(positions, head_size - size)
    return torch.cat((cos, cos, rest), dim=-1), torch.cat((-sin, sin, 0 * rest), dim=-1)


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table (N, D) at positions (B, T): (B, 1, T, D).

    `table[positions]` would become ONNX GatherND, which Qualcomm's HTP library does not take;
    this is Gather.
    """
    rows = table.index_select(0, positions.flatten())
    return rows.view(positions.shape[0], 1, positions.shape[1], table.shape[1])
