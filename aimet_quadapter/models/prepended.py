"""Keys or values of a few tokens that every text is read behind, as constants of the model."""

from __future__ import annotations

from typing import Any

import torch
from aimet_torch.nn import QuantizationMixin
from torch import Tensor, nn


@QuantizationMixin.ignore  # it has no encoding of its own
class Prepended(nn.Module):
    """(B, K, T, D) → (B, K, P + T, D): constants before a text's own keys or values.

    The constants are one tensor with what they stand beside: they pass the quantizer of the module
    that made the text's keys or values, so they have its encoding, and its range counts them.
    (Where phase 1 takes ranges from the batch, theirs is their own.)

    Args:
        constant: keys or values of the P tokens (1, K, P, D).
    """

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.constant = nn.Parameter(constant, requires_grad=False)

    def forward(self, x: Tensor, maker: nn.Module | None = None) -> Tensor:
        """Put the constants, quantized as the output of x's maker, before x."""
        quantizer = _output_quantizer(maker)
        first = self.constant if quantizer is None else quantizer(self.constant)
        return torch.cat((first.expand(x.shape[0], -1, -1, -1), x), dim=2)


def _output_quantizer(module: Any) -> Any:
    """The quantizer at the output of a module; None for one that has none, or is no sim's."""
    quantizers = getattr(module, "output_quantizers", None)
    return quantizers[0] if quantizers is not None and len(quantizers) else None
