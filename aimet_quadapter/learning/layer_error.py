"""The error of a layer for the α of all pairs inside it, beside its unquantized output.

    mean over the tokens of ‖ŷ_t − y_t‖² / ‖y_t‖²

ŷ and y the layer's outputs with and without its quantizers, on tokens that α is trained on, and on
tokens that are held back. A share of each token's own size, because that is what the norm behind
the layer makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..errors import DataError
from ..sim.values import all_finite
from .block_error import held_tokens
from .layers import Layer

SMALLEST = 1e-2
"""A token counts as if its size were at least this share of the median: one may be zero."""


class LayerError:
    """The error of one layer, as a function of the α of its pairs, one behind the other.

    Ranges come from the batch: a whole sample.

    Args:
        layer: the layer.
        config: says how many tokens are held back.

    Attributes:
        targets: y for each sample, (tokens, channels).

    Raises:
        DataError: the layer's unquantized output is not finite.
    """

    def __init__(self, layer: Layer, config: CalibrationConfig) -> None:
        self.layer = layer
        self.pairs = layer.pairs
        with torch.no_grad(), layer.unquantized():
            self.targets = [_rows(layer(call)) for call in layer.calls]
        if not all(all_finite(y) for y in self.targets):
            raise DataError(
                f"the unquantized output of {layer.name} holds NaN or inf. Run the model in a "
                "wider dtype (bf16 or fp32), or check the calibration data."
            )
        self._power = [_power(y) for y in self.targets]
        generator = torch.Generator().manual_seed(config.seed)
        self._held = [held_tokens(len(y), config.holdout, generator) for y in self.targets]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def device(self) -> torch.device:
        """Where α must lie."""
        return self.targets[0].device

    def _of(self, index: int, alpha: Tensor, tokens: Tensor) -> Tensor:
        sizes = [pair.channels for pair in self.pairs]
        alphas = {p.name: a for p, a in zip(self.pairs, alpha.split(sizes), strict=True)}
        with self.layer.quantized():
            output = _rows(self.layer(self.layer.quantized_calls[index], alphas))
        target = self.targets[index]
        return self.size(index, (output.float() - target.float())[tokens], tokens)

    def size(self, index: int, error: Tensor, tokens: Tensor) -> Tensor:
        """The size of an error.

        Args:
            index: place of the sample.
            error: ŷ − y of some tokens, (tokens, channels).
            tokens: which those are.
        """
        return (error.square().sum(-1) / self._power[index][tokens]).mean()

    @torch.no_grad()
    def on_held_back(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The error on the held-back tokens, mean over the samples; no token is an extreme."""
        losses = [
            float(self._of(index, alpha, held if held.any() else ~held))
            for index, held in enumerate(self._held)
        ]
        return sum(losses) / len(losses), torch.zeros(0, dtype=torch.long)

    def on_trained(self, step: int, alpha: Tensor, _extremes: Tensor) -> Tensor:
        """The error on one sample's other tokens, differentiable in α; the samples take turns."""
        index = (step - 1) % len(self._held)
        return self._of(index, alpha, ~self._held[index])


def _rows(y: Tensor) -> Tensor:
    """(B, T, C) → (tokens, channels); of other shapes each sample is a row."""
    return y.flatten(0, 1) if y.dim() == 3 else y.flatten(1)


def _power(y: Tensor) -> Tensor:
    """‖y_t‖² of each row, not below `SMALLEST`; (tokens,)."""
    power = y.float().square().sum(-1)
    least = SMALLEST * (float(power.median()) or float(power.mean()))
    return power.clamp(min=least or 1.0)
