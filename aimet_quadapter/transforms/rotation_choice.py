"""Whether to turn the residual stream: by what quantizing does to the whole model either way."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..learning.choice import for_ranges, held_back
from ..models import PreparedDecoder
from ..sim.inputs import Sample
from ..sim.losses import EndLoss
from ..sim.ranges import set_ranges
from ..sim.samples import as_samples
from .rotation import check_rotatable, rotate

AS_IT_IS = "none"
"""Name of the stream that is not turned."""


@dataclass(frozen=True)
class RotationChoice:
    """Result of `choose_rotation`.

    Attributes:
        kind: how the model's stream is turned now, "none" where it is as it was.
        losses: "none" and the kind that was tried → `EndLoss` of the sim made of that model, on
            the samples that it was compared on.
    """

    kind: str
    losses: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{'rotation':<32} {'divergence':>10}"]
        for kind, loss in self.losses.items():
            mark = "  chosen" if kind == self.kind else ""
            lines.append(f"{kind:<32} {loss:>10.4f}{mark}")
        return "\n".join(lines)


def choose_rotation(
    model: PreparedDecoder,
    calib_loader: Iterable[Any],
    make_sim: Callable[[PreparedDecoder], Any],
    *,
    kind: str = "hadamard",
    seed: int = 0,
) -> RotationChoice:
    """Rotate the stream if the model, quantized as it will be, is nearer to itself then.

    A rotation takes outliers off activations and pays with weights: those of norms, which quiet
    the stream's loud channels, are folded away, and every error of a weight meets all channels. So
    which is better depends on the model and on its bits. Two sims are made one after the other, of
    the model as it is and of a rotated copy; ranges are set on some samples, α are ones, and
    KL(unquantized ‖ quantized) is measured on others: the last eighth, which `calibrate` chooses on
    (of fewer than four samples all do both). An endless or empty loader, NaN, another device, half
    precision: docs/limits.md.

    Args:
        model: what `prepare` returned, with the prefix that it will have; rotated in place where
            that wins.
        calib_loader: yields token ids, as for `apply_quadapter`.
        make_sim: gives the sim of a copy of the model, with the bits that it will have and without
            ranges.
        kind: of the rotation, see `rotate`.
        seed: of the rotation.

    Returns:
        The choice and both losses; `print` shows the table. As it is where both are equal.

    Raises:
        UnsupportedModelError: not a prepared model, a sim's model, or one that `rotate` refuses.
        SimError: its weights hold NaN or inf.
        DataError: the samples do not fit, or none has a token to predict.
        ValueError: no such kind.
        On any exception, Ctrl-C included, the model is as it was.
    """
    check_rotatable(model, kind)
    samples = as_samples(calib_loader, model)
    losses = {}
    for name in (AS_IT_IS, kind):
        tried = copy.deepcopy(model)
        if name != AS_IT_IS:
            rotate(tried, kind=kind, seed=seed)
        sim = make_sim(tried)
        del tried  # a sim that has a copy of its own needs it no more
        losses[name] = _loss(sim, samples)
        del sim
        gc.collect()  # a sim refers to itself
    best = kind if losses[kind] < losses[AS_IT_IS] else AS_IT_IS
    if best != AS_IT_IS:
        rotate(model, kind=kind, seed=seed)
    return RotationChoice(best, losses)


def _loss(sim: Any, samples: Sequence[Sample]) -> float:
    fitted, held = held_back(samples)
    set_ranges(sim, for_ranges(fitted, held))
    return EndLoss(sim.model, held)()
