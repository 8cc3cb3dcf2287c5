"""What an 8-bit softmax loses, made up for by two changes that leave no operation behind."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from ..errors import DataError, SimError
from ..models.attention import MASK_VALUE, Attention
from ..pairs.attachment import refuse_attached
from ..pairs.discovery import find_pairs
from ..pairs.folding import parameter_quantizers, weights_restored
from ..pairs.pair import Pair
from ..pairs.proof import unchanged
from ..progress import progress
from ..sim.checks import check_ranges, check_sim
from ..sim.inputs import example_inputs
from ..sim.ranges import activation_quantizers, restored, set_ranges
from ..sim.samples import Sample, as_samples
from ..sim.sites import interval, set_range

VANISHED = 16.0
"""Scores this far below the largest of their row have no part in a softmax.

exp(−16) is 1e-7, a hundredth of the step of a 16-bit softmax.
"""

SLACK = 16.0
"""How far the largest score of a row of new text may lie below that of every row seen."""

Interval = tuple[float, float]


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


@dataclass
class _Sums:
    """What one attention's softmax quantizer does to its output (B, H, T, D), per sample.

    With δ = Σ_j E_ij the lost probability of a row and e = E V the error of the output:

    Attributes:
        products: Σ δ e over rows, (H, D).
        squares: Σ δ² over rows, (H, 1).
        errors: Σ ‖e‖² over rows.
        outputs: Σ ‖P V‖² over rows.
        visible: rows of the call under way that see anything (B or 1, 1, T, 1).
        exact: P of that call.
    """

    products: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    visible: Tensor | None = None
    exact: Tensor | None = None

    def see_mask(self, _: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        """Keep which rows count: a padding token's is hidden whole."""
        self.visible = _visible(args[1])

    def see_softmax(self, softmax: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        """Keep P, the probabilities without the quantizer."""
        self.exact = torch.softmax(args[0], softmax.dim)

    def see_product(self, _: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        """Add the sums of P̂ V."""
        assert self.exact is not None
        assert self.visible is not None
        rounded, values = args
        self.exact = self.exact * self.visible
        lost = rounded * self.visible - self.exact  # E
        delta = lost.sum(-1, keepdim=True).double()
        error = (lost @ values).double()
        self.products.append((delta * error).sum((0, 2)))
        self.squares.append(delta.square().sum((0, 2)))
        self.errors.append(float(error.square().sum()))
        self.outputs.append(float((self.exact @ values).double().square().sum()))
        self.exact = self.visible = None

    def solve(self, columns: Tensor, channels: int) -> Shift:
        """Find c by least squares on all samples, shrunk to what it is worth on a sample left out.

        Args:
            columns: channel of the values behind each place of the merged heads (H·D,).
            channels: number of channels.
        """

        def by_channel(x: Tensor) -> Tensor:
            return x.new_zeros(channels).index_add(0, columns.to(x.device), x.flatten())

        sums = list(zip(self.products, self.squares, strict=True))
        products = torch.stack([by_channel(p) for p, _ in sums])  # (samples, channels)
        squares = torch.stack([by_channel(q.expand_as(p)) for p, q in sums])
        without = _ratio(products.sum(0) - products, squares.sum(0) - squares)
        gain, cost = float((without * products).sum()), float((without**2 * squares).sum())
        kept = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
        total, output = sum(self.errors), sum(self.outputs)
        left = 1 - (2 * kept * gain - kept**2 * cost) / total if total > 0 else 1.0
        c = kept * _ratio(products.sum(0), squares.sum(0))
        return Shift(c, (total / output) ** 0.5 if output > 0 else 0.0, kept, left)


def _visible(mask: Tensor) -> Tensor:
    """Which rows of a mask (B or 1, 1, T, S) leave something to see, (B or 1, 1, T, 1)."""
    return mask.amax(-1, keepdim=True) > MASK_VALUE / 2


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)


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
        sums = _measure(sim, attentions, samples)
        solved = {n: sums[n].solve(p.columns[0], p.channels) for n, p in pairs.items()}
        with torch.no_grad(), unchanged(sim, example_inputs(sim), "the centred values"):
            for name, shift in solved.items():
                _take_off(sim.model, pairs[name], shift.c)
        with _largest_scores(attentions) as largest:
            set_ranges(sim, range_samples)
        if range_loader is not None:
            with _largest_scores(attentions, largest), in_eval_mode(sim.model), torch.no_grad():
                for sample in progress(samples, "measuring the scores"):
                    sim.model(*sample)
        done = []
        for name, shift in solved.items():
            was, now = _limit(attentions[name], *largest[name])
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


def _measure(
    sim: Any, attentions: dict[str, Attention], samples: Sequence[Sample]
) -> dict[str, _Sums]:
    """Run the quantized model on the samples and sum up what each softmax loses."""
    sums = {name: _Sums() for name in attentions}
    with torch.no_grad(), in_eval_mode(sim.model), ExitStack() as stack:
        for name, module in attentions.items():
            for part, hook in (
                (module.add_mask, sums[name].see_mask),
                (module.softmax, sums[name].see_softmax),
                (module.av, sums[name].see_product),
            ):
                stack.callback(part.register_forward_hook(hook).remove)
        for sample in progress(samples, "measuring the softmax"):
            sim.model(*sample)
    return sums


def _take_off(model: nn.Module, pair: Pair, c: Tensor) -> None:
    """b_v ← b_v − c and b_o ← b_o + W_o c."""
    if not c.any():
        return
    producer = model.get_submodule(pair.producer)
    rows = next(s.index for s in pair.scales if s.module == pair.producer).flatten()
    (consumer,) = (model.get_submodule(n) for n in pair.consumers)
    weight = consumer.get_parameter("weight")
    _add_bias(producer, -_spread(c, rows))
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


@contextmanager
def _largest_scores(
    attentions: dict[str, Attention], seen: dict[str, tuple[float, float]] | None = None
) -> Iterator[dict[str, tuple[float, float]]]:
    """Watch the largest score of every row that is not padding.

    Args:
        attentions: name → attention.
        seen: what was seen before, to go on from.

    Yields:
        name → (smallest, largest) of them, complete when the context ends.
    """
    found = {n: (float("inf"), -float("inf")) for n in attentions} if seen is None else seen
    visible: dict[str, Tensor] = {}

    def mask(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        visible[name] = _visible(args[1])

    def scores(name: str, softmax: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().amax(softmax.dim, keepdim=True)
        rows = rows[visible.pop(name).expand_as(rows)]
        if rows.numel():
            low, high = found[name]
            found[name] = min(low, float(rows.min())), max(high, float(rows.max()))

    with ExitStack() as stack:
        for name, module in attentions.items():
            for part, hook in ((module.add_mask, mask), (module.softmax, scores)):
                handle = part.register_forward_pre_hook(functools.partial(hook, name))
                stack.callback(handle.remove)
        yield found


def _limit(
    attention: Attention, least: float, largest: float
) -> tuple[Interval | None, Interval | None]:
    """Raise the lower end of the masked scores' range; the range before and after."""
    q: Any = attention.add_mask.output_quantizers[0]
    if not isinstance(q, QuantizeDequantize):
        return None, None
    was = (q.get_min().item(), q.get_max().item())
    low = least - VANISHED - SLACK
    if q.is_overwrite_allowed() and was[0] < low:
        set_range(q, low, largest)
    return was, (q.get_min().item(), q.get_max().item())
