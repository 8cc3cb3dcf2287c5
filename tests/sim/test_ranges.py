"""Ranges of the batch: the values and gradients of the formula, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from torch import Tensor

from aimet_quadapter.sim.ranges import LONG, batch_quantize_dequantize


def rows_of(x: Tensor, quantizer: QuantizeDequantize) -> Tensor:
    """The formula in torch's own operations: a gradient for the first smallest and largest."""
    rows = x.reshape(quantizer.shape[0] if quantizer.shape else 1, -1)
    low = rows.take_along_dim(rows.detach().argmin(1, keepdim=True), 1).clamp(max=0)
    high = rows.take_along_dim(rows.detach().argmax(1, keepdim=True), 1).clamp(min=0)
    steps = quantizer.qmax - quantizer.qmin
    scale = (high - low) / steps
    if quantizer.symmetric:
        scale = torch.maximum(high / (steps // 2), -low / (steps - steps // 2))
    offset = torch.zeros_like(scale) if quantizer.symmetric else (low / scale).detach().round()
    lowest = quantizer.qmin if quantizer.symmetric else 0
    whole = (rows / scale).detach().round().clamp(lowest + offset, lowest + steps + offset)
    # Straight through the rounding: x, and of the scale what y has beside x.
    y = rows + scale * ((whole * scale - rows) / scale).detach()
    return (y - y.detach() + whole * scale.detach()).reshape(x.shape)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(None, LONG + 64), (None, LONG + 1), (None, 48), (3, 2 * LONG), (5, 48)],
    ids=["long", "prime", "short", "long-rows", "rows"],
)
def test_a_range_of_the_batch_has_the_gradient_of_the_formula(rows, columns, symmetric) -> None:
    shape = () if rows is None else (rows, 1)
    quantizer = QuantizeDequantize(shape, 4, symmetric)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((rows or 1, columns), generator=generator)
    x[:, 7], x[:, -3] = x.amin(1), x.amax(1)  # twice: the first counts
    grad = torch.randn(x.shape, generator=generator)
    found = []
    for function in (batch_quantize_dequantize, rows_of):
        given = x.clone().requires_grad_()
        y = function(given, quantizer)
        found.append((y.detach(), *torch.autograd.grad(y, given, grad)))
    (y, own), (wanted_y, wanted) = found
    torch.testing.assert_close(y, wanted_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - grad).abs().amax() > 0.01  # something reached the ends
