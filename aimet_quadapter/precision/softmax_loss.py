"""What quantizing a softmax does to the output of its attention, measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from ..models.attention import Attention
from ..progress import progress
from ..sim.inputs import Sample
from .visible_rows import visible_rows


@dataclass
class SoftmaxLoss:
    """What one attention's softmax quantizer does to its output (B, H, T, D), per sample.

    With E = P̂ − P, δ = Σ_j E_ij the lost probability of a row and e = E V the error of the output:

    Attributes:
        products: Σ δ e over rows, (H, D).
        squares: Σ δ² over rows, (H, 1).
        errors: Σ ‖e‖² over rows.
        outputs: Σ ‖P V‖² over rows.
    """

    products: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)

    def add(self, exact: Tensor, rounded: Tensor, values: Tensor, visible: Tensor) -> None:
        """Add the sums of one sample.

        Args:
            exact: P, the probabilities without the quantizer (B, H, T, S).
            rounded: P̂, those with it.
            values: V (B, H, S, D).
            visible: rows that count (B or 1, 1, T, 1).
        """
        exact = exact * visible
        lost = rounded * visible - exact  # E
        delta = lost.sum(-1, keepdim=True).double()
        error = (lost @ values).double()
        self.products.append((delta * error).sum((0, 2)))
        self.squares.append(delta.square().sum((0, 2)))
        self.errors.append(float(error.square().sum()))
        self.outputs.append(float((exact @ values).double().square().sum()))


def measure(
    sim: Any, attentions: Mapping[str, Attention], samples: Sequence[Sample]
) -> dict[str, SoftmaxLoss]:
    """Run the quantized model on the samples and sum up what each softmax loses.

    Args:
        sim: the sim.
        attentions: name → attention of the sim's model.
        samples: positional inputs of the model, one tuple a sample.
    """
    losses = {name: SoftmaxLoss() for name in attentions}
    exact: dict[str, Tensor] = {}  # P of the call under way

    with (
        torch.no_grad(),
        in_eval_mode(sim.model),
        visible_rows(attentions) as visible,
        ExitStack() as stack,
    ):

        def see_softmax(name: str, softmax: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            exact[name] = torch.softmax(args[0], softmax.dim)

        def see_product(name: str, _: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            rounded, values = args
            losses[name].add(exact.pop(name), rounded, values, visible.pop(name))

        for name, module in attentions.items():
            for part, hook in ((module.softmax, see_softmax), (module.av, see_product)):
                handle = part.register_forward_hook(functools.partial(hook, name))
                stack.callback(handle.remove)
        for sample in progress(samples, "measuring the softmax"):
            sample(sim.model)
    return losses
