"""What an 8-bit softmax loses, made up for by two changes that leave no operation behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode

from ..errors import DataError, SimError
from ..models.attention import Attention
from ..pairs.attachment import refuse_attached
from ..pairs.discovery import find_pairs
from ..pairs.folding import weights_restored
from ..pairs.pair import Pair
from ..pairs.proof import unchanged
from ..progress import progress
from ..sim.checks import check_ranges, check_sim
from ..sim.inputs import example_inputs
from ..sim.ranges import activation_quantizers, restored, set_ranges
from ..sim.samples import as_samples
from ..sim.sites import interval
from .masked_range import Interval, largest_scores, raise_lower_end
from .softmax_loss import measure
from .value_shift import Shift, solve, take_off


@dataclass(frozen=True)
class CompensatedAttention:
    """What was done to one attention.

    Attributes:
        name: the attention's name in the model.
        shift: of its values.
        was: range of the masked scores on the calibration data (min, max); None where they have no
            integer quantizer.
        range: their range now.
    """

    name: str
    shift: Shift
    was: Interval | None
    range: Interval | None


@dataclass(frozen=True)
class SoftmaxCompensation:
    """Result of `compensate_softmax`: one entry an attention, in the model's order."""

    attentions: tuple[CompensatedAttention, ...]

    def __str__(self) -> str:
        lines = [
            f"{'attention':<40} {'error':>7} {'shift':>5} {'left':>5} {'masked scores':>20} "
            f"{'now':>20}"
        ]
        for a in self.attentions:
            was, now = ("off" if r is None else interval(r) for r in (a.was, a.range))
            lines.append(
                f"{a.name:<40} {a.shift.error:>7.2%} {a.shift.kept:>5.0%} {a.shift.left:>5.0%} "
                f"{was:>20} {now:>20}"
            )
        return "\n".join(lines)


def compensate_softmax(
    sim: Any, calib_loader: Iterable[Any], range_loader: Iterable[Any] | None = None
) -> SoftmaxCompensation:
    """Make up for what quantizing the softmax loses; the unquantized function stays the same.

    A softmax of 8 bits rounds every probability below 1/510 to zero: heads that look at many
    tokens lose them, and the rows of P̂ = P + E do not sum to one. Two changes:

    1. **The values are centred.** For any c, P V = P (V − 1cᵀ) + 1cᵀ, since the rows of P sum to
       one; so c goes off the bias of the value projection and W_o c onto the bias of the output
       projection (which get a bias if they have none). The error E V becomes E V − δ cᵀ with
       δ = E 1, and

           c = λ argmin Σ ‖E V − δ cᵀ‖² = λ Σ δ (E V) / Σ δ²  per channel, over all rows,

       with λ in [0, 1], one an attention, the best for c of all samples but one on that one: in a
       model whose values have no mean that holds from text to text, λ is 0 and nothing is shifted.

    2. **Masked scores get less range.** The range of scores plus mask, [min, max], reaches down to
       the mask's value. A score `VANISHED` below the largest of its row has no part in the
       softmax, so the lower end is raised to

           min over rows (largest score of the row) − `VANISHED` − `SLACK`,

       and what is masked stays hidden from a row of new text unless its largest score lies more
       than `SLACK` below that of every row seen. Rows of padding do not count.

    Then ranges are set anew. Call it on what phase 1 left (`apply_quadapter` without a
    `finetune_loader`, or `fold`), before phase 2, `choose_ranges` and `assign_bits`. Pairs found
    before it do not know the new biases: find them again. The shift by channel is that of Outlier
    Suppression+ (Wei et al., 2023), with another aim.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim of a model that `prepare` made, ranges set, with a quantizer on the softmax;
            its biases and ranges are changed in place.
        calib_loader: yields inputs of the model, as in `apply_quadapter`; at least two samples,
            which should be as long as the texts to come.
        range_loader: yields the inputs that ranges are set on; those of `calib_loader` when not
            given. A shift gets better with more text, a range between extremes does not.

    Returns:
        What was done to each attention; `print` shows the table.

    Raises:
        SimError: not such a sim.
        UnfoldedError: the sim carries an α.
        DataError: the samples do not fit the model, or there is only one.
        PairError: a change does not leave the unquantized model's output as it is.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    check_sim(sim)
    refuse_attached(sim)
    attentions = _quantized_attentions(sim)
    samples = as_samples(calib_loader, sim.model)
    if len(samples) < 2:
        raise DataError(
            "1 sample was given; at least 2 are needed: what a shift is worth is measured on "
            "samples it was not fitted to. Cut the text into more samples."
        )
    range_samples = samples if range_loader is None else as_samples(range_loader, sim.model)
    check_ranges(sim.model, samples[0])
    pairs = _pairs_of(sim, attentions)
    with (
        restored(list(sim.quantizers()), only_on_error=True),
        weights_restored(sim, pairs.values(), only_on_error=True),
    ):
        losses = measure(sim, attentions, samples)
        solved = {n: solve(losses[n], p.columns[0], p.channels) for n, p in pairs.items()}
        with torch.no_grad(), unchanged(sim, example_inputs(sim), "the centred values"):
            for name, shift in solved.items():
                take_off(sim.model, pairs[name], shift.c)
        with largest_scores(attentions) as largest:
            set_ranges(sim, range_samples)
        if range_loader is not None:
            with largest_scores(attentions, largest), in_eval_mode(sim.model), torch.no_grad():
                for sample in progress(samples, "measuring the scores"):
                    sample(sim.model)
        done = []
        for name, shift in solved.items():
            was, now = raise_lower_end(attentions[name], *largest[name])
            done.append(CompensatedAttention(name, shift, was, now))
    return SoftmaxCompensation(tuple(done))


def _quantized_attentions(sim: Any) -> dict[str, Attention]:
    """Every attention whose softmax has a quantizer."""
    found = {n: m for n, m in sim.model.named_modules() if isinstance(m, Attention)}
    if not found:
        raise SimError(
            "the sim's model has no attention that prepare made: its softmax is out of reach. "
            "Make the sim of prepare(model)."
        )
    quantizers = {n: activation_quantizers(m.softmax, "output") for n, m in found.items()}
    quantized = {n: m for n, m in found.items() if quantizers[n]}
    if not quantized:
        raise SimError(
            "no softmax of the sim has a quantizer, so it loses nothing. Leave this step out, or "
            "make the sim without keep_module_sites."
        )
    return quantized


def _pairs_of(sim: Any, attentions: Iterable[str]) -> dict[str, Pair]:
    """Attention → the pair of its value and output projections."""
    pairs = find_pairs(sim, kinds="v-o")
    through = {inner: pair for pair in pairs for inner in pair.between}
    missing = [n for n in attentions if f"{n}.av" not in through]
    if missing:
        reasons = [str(r) for r in pairs.refused] or ["no candidate"]
        raise SimError(
            f"{missing[0]} has no value and output projection that may be changed "
            f"({'; '.join(reasons[:3])}). print(find_pairs(sim)) shows every candidate."
        )
    return {n: through[f"{n}.av"] for n in attentions}
