"""The shift of an attention's values that makes up for most of what its softmax loses.

P V = P (V − 1cᵀ) + 1cᵀ, so the error E V becomes E V − δ cᵀ with δ = E 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pairs.folding import parameter_quantizers
from ..pairs.pair import Pair
from .softmax_loss import SoftmaxLoss


@dataclass(frozen=True)
class Shift:
    """What is taken off the values of one attention.

    Attributes:
        c: the shift of each channel, in the order of its pair's α.
        error: ‖E V‖ / ‖P V‖, what quantizing the softmax does to the attention's output.
        kept: share λ of the least-squares shift that is worth it on samples left out.
        left: share of ‖E V‖² that is left on samples left out.
    """

    c: Tensor
    error: float
    kept: float
    left: float


def solve(loss: SoftmaxLoss, columns: Tensor, channels: int) -> Shift:
    """Find c by least squares on all samples, shrunk to what it is worth on a sample left out.

    Args:
        loss: of the attention, two samples or more.
        columns: channel of the values behind each place of the merged heads (H·D,).
        channels: number of channels.
    """

    def by_channel(x: Tensor) -> Tensor:
        return x.new_zeros(channels).index_add(0, columns.to(x.device), x.flatten())

    sums = list(zip(loss.products, loss.squares, strict=True))
    products = torch.stack([by_channel(p) for p, _ in sums])  # (samples, channels)
    squares = torch.stack([by_channel(q.expand_as(p)) for p, q in sums])
    without = _ratio(products.sum(0) - products, squares.sum(0) - squares)
    gain, cost = float((without * products).sum()), float((without**2 * squares).sum())
    kept = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
    total, output = sum(loss.errors), sum(loss.outputs)
    left = 1 - (2 * kept * gain - kept**2 * cost) / total if total > 0 else 1.0
    c = kept * _ratio(products.sum(0), squares.sum(0))
    return Shift(c, (total / output) ** 0.5 if output > 0 else 0.0, kept, left)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)


def take_off(model: nn.Module, pair: Pair, c: Tensor) -> None:
    """b_v ← b_v − c and b_o ← b_o + W_o c, in place.

    Args:
        model: the sim's model.
        pair: the attention's pair of value and output projection.
        c: the shift of each channel (channels,).
    """
    if not c.any():
        return
    producer = model.get_submodule(pair.producer)
    rows = next(s.index for s in pair.scales if s.module == pair.producer).flatten()
    (consumer,) = (model.get_submodule(n) for n in pair.consumers)
    weight = consumer.get_parameter("weight")
    _add_bias(producer, -_spread(c, rows))
    for scale in pair.scales:
        if scale.parameter == "constant":  # values before the text are values too
            constant = model.get_submodule(scale.module).get_parameter("constant")
            constant.data.sub_(_spread(c, scale.index).to(constant))
    _add_bias(consumer, weight.double() @ _spread(c, pair.columns[0]))


def _spread(c: Tensor, index: Tensor) -> Tensor:
    """Give each place the c of its channel, 0 where there is none (−1)."""
    index = index.to(c.device)
    return torch.where(index >= 0, c[index.clamp(min=0)], 0.0)


def _add_bias(module: Any, values: Tensor) -> None:
    """Add to a quantized linear's bias; give it one if it has none."""
    if module.bias is not None:
        module.bias.data.copy_(module.bias.double() + values)
        return
    module.bias = nn.Parameter(values.to(module.weight))
    for quantizers in parameter_quantizers(module):
        quantizers["bias"] = None  # as AIMET makes them for a module that has one from the start
