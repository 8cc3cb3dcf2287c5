"""How far the logits of a runtime are from those of the sim, in steps of the output quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ..sim.outputs import logits_place, tensors_in

DEVIATION = 1 / 32
"""`share_of_range` up to which a device's difference is still its own arithmetic.

Random and trained models of 2 to 16 layers, 8 and 16 bits: at most 2.1 %. What was compiled
wrongly: 4 % to 21 % (docs/bits.md, docs/generation.md).
"""


def share_of_range(got: Tensor, expected: Tensor) -> float:
    """|got − expected| on average, by (max − min) of expected; two tensors of one shape."""
    error = (got - expected).abs().mean()
    return float(error / (expected.max() - expected.min())) if error else 0.0


@dataclass
class Difference:
    """Differences summed over positions, and how often the most likely token is the same.

    Attributes:
        step: quantization step of the logits.
        values: number of logits compared.
        total: sum of |difference| in steps.
        largest: largest |difference| in steps.
        positions: number of positions compared.
        same: positions with the same most likely token, the first where several tie.
        same_or_tie: positions where a token is most likely in both; in 8 bits tokens often tie.
    """

    step: float
    values: int = 0
    total: float = 0.0
    largest: float = 0.0
    positions: int = 0
    same: int = 0
    same_or_tie: int = 0

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Compare logits of the same positions, (…, V) both."""
        got, expected = (x.detach().cpu().reshape(-1, x.shape[-1]) for x in (got, expected))
        steps = (got - expected).abs() / self.step
        self.values += steps.numel()
        self.total += float(steps.sum(dtype=torch.float64))
        self.largest = max(self.largest, float(steps.max()))
        self.positions += len(got)
        self.same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        # Values of one level may differ by a float's last bits.
        top = [x >= x.amax(-1, keepdim=True) - self.step / 4 for x in (got, expected)]
        self.same_or_tie += int((top[0] & top[1]).any(-1).sum())

    @property
    def mean(self) -> float:
        """Mean |difference| in steps."""
        return self.total / self.values

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.same / self.positions

    @property
    def agreement_or_tie(self) -> float:
        """Share of positions where a token is most likely in both."""
        return self.same_or_tie / self.positions

    def __str__(self) -> str:
        return f"{self.mean:.2f} steps mean, {self.largest:.0f} largest"


class Logits(nn.Module):
    """A model whose output is its logits (B, T, V) alone, float32, whatever else it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", SimpleNamespace())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        outputs = tensors_in(self.model(*args, **kwargs))
        return outputs[logits_place(outputs, self.model) or 0].float()


class Paired(nn.Module):
    """Runs two models on the same ids, notes their difference, returns the first one's logits."""

    def __init__(self, model: nn.Module, expected: nn.Module, difference: Difference) -> None:
        super().__init__()
        self.model, self.expected, self.difference = model, expected, difference
        self.config = getattr(model, "config", SimpleNamespace())

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        self.difference.add(logits, self.expected(ids))
        return logits


def output_step(file: Path) -> float | None:
    """Scale of the logits' quantizer in a QDQ file; None when it has none for the whole tensor."""
    graph = onnx.load(file, load_external_data=False).graph
    last = [n for n in graph.node if "logits" in n.output]
    if not last or last[0].op_type != "DequantizeLinear":
        return None
    scales = [t for t in graph.initializer if t.name == last[0].input[1]]
    scale = numpy_helper.to_array(scales[0]) if scales else None
    return float(scale) if scale is not None and scale.size == 1 else None
