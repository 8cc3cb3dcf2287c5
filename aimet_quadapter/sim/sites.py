"""A sim's activation quantizers one by one, what they see, and the loss of the model with them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import in_eval_mode
from torch import Tensor

from ..errors import DataError, SimError
from .checks import check_sim
from .inputs import Sample
from .losses import LOSSES
from .ranges import activation_quantizers, restored, undone
from .samples import as_samples
from .weights import quantized_once


@dataclass(frozen=True)
class Site:
    """One activation quantizer with one range.

    Attributes:
        name: the module's name, with ` (input 0)` behind it for a quantizer of an input.
        quantizer: AIMET's.
    """

    name: str
    quantizer: QuantizeDequantize


@dataclass
class Seen:
    """What passed one site, a row being a vector along the last dimension.

    Attributes:
        low: smallest value of each row.
        high: largest value of each row.
        errors: relative error ‖Q(x) − x‖² / ‖x‖² of each row, at most 1.
        channels: per sample, ‖Q(x) − x‖² and ‖x‖² of each channel (2, C) of a (B, T, C) tensor.
    """

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    channels: list[Tensor] = field(default_factory=list)

    def __call__(self, _: object, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = torch.atleast_1d(args[0].detach()).float()
        features = x.dim() == 3
        x = x.reshape(-1, x.shape[-1])
        squares = x.square()
        wrong = (output.detach().float().reshape(x.shape) - x).square()
        self.low.append(x.amin(-1))
        self.high.append(x.amax(-1))
        self.errors.append(_relative(wrong.sum(-1), squares.sum(-1)))
        if features:
            self.channels.append(torch.stack((wrong.sum(0), squares.sum(0))))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(float(x.min()) for x in self.low), max(float(x.max()) for x in self.high)

    @property
    def error(self) -> float:
        """Mean relative error of a row, or of a channel if that is larger.

        All rows count the same, however small they are, and so do all channels: what a massive
        row or channel does to the others is not hidden by its own size.
        """
        rows = float(torch.cat(self.errors).mean())
        if len({part.shape for part in self.channels}) != 1:
            return rows
        return max(rows, float(_relative(*torch.stack(self.channels).sum(0)).mean()))

    def magnitude(self, share: float) -> float:
        """What this share of the rows stays within, in absolute value."""
        rows = torch.maximum(torch.cat(self.high), -torch.cat(self.low)).sort().values
        return float(rows[min(int(share * len(rows)), len(rows) - 1)])


def _relative(wrong: Tensor, squares: Tensor) -> Tensor:
    """Relative errors; 0 where there is nothing, at most 1 elsewhere: lost cannot be more lost."""
    relative = wrong / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.where(squares > 0, relative, 0).clamp(max=1)


class Trials:
    """A sim, calibration samples, and the loss of the one on the other.

    Args:
        sim: an AIMET sim of a causal language model with its ranges set.
        loader: yields inputs of the model, as in `apply_quadapter`.
        loss: "cross-entropy" of the text, or "distillation" from the unquantized model.

    Raises:
        SimError: not a sim, or a range is not set.
        DataError: the samples do not fit the model.
        ValueError: no such loss.
    """

    def __init__(self, sim: Any, loader: Iterable[Any], loss: str) -> None:
        check_sim(sim)
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; known are {', '.join(map(repr, LOSSES))}.")
        self.model = sim.model
        self.samples: Sequence[Sample] = as_samples(loader, sim.model)
        self._loss = LOSSES[loss]
        self.sim = sim

    def loss(self) -> float:
        """Mean loss of the samples; inf if a setting makes it NaN."""
        with torch.no_grad(), in_eval_mode(self.model):
            values = [float(self._loss(self.model, sample)) for sample in self.samples]
        mean = sum(values) / len(values)
        return mean if math.isfinite(mean) else math.inf

    def start(self) -> float:
        """The loss before anything is changed.

        Raises:
            DataError: it is NaN or inf, so nothing could be compared with it.
        """
        loss = self.loss()
        if not math.isfinite(loss):
            raise DataError(
                f"the loss is {loss} before anything is changed: activations overflow, or a sample "
                "has no token to predict. Check the samples, or take a wider dtype."
            )
        return loss

    def sites(self, patterns: Iterable[str] | None = None) -> list[Site]:
        """Every activation quantizer that is on, or those whose name fits a pattern.

        Raises:
            SimError: one of them has no range.
            DataError: no name fits.
        """
        wanted = None if patterns is None else tuple(patterns)
        found = [
            site
            for site in _sites(self.sim)
            if wanted is None or any(fnmatch.fnmatchcase(site.name, p) for p in wanted)
        ]
        if not found:
            raise DataError(
                f"no activation quantizer that is on fits {', '.join(wanted or ('*',))}. Names "
                "are those of sim.named_qmodules(), e.g. '*.down_proj'."
            )
        for site in found:
            if not site.quantizer.is_initialized():
                raise SimError(
                    f"the quantizer {site.name} has no range yet. Run sim.compute_encodings(...) "
                    "on the calibration data first."
                )
        return found

    def observe(self, sites: Iterable[Site]) -> dict[str, Seen]:
        """Run the samples once; what each site saw, for those that the model uses."""
        seen = {site.name: (site, Seen()) for site in sites}
        handles = [s.quantizer.register_forward_hook(watch) for s, watch in seen.values()]
        try:
            with torch.no_grad(), in_eval_mode(self.model):
                for sample in self.samples:
                    sample(self.model)
        finally:
            for handle in handles:
                handle.remove()
        return {name: watch for name, (_, watch) in seen.items() if watch.low}

    @contextmanager
    def search(self, sites: Iterable[Site]) -> Iterator[None]:
        """Weights are quantized once for all trials; the sites are as they were on an error."""
        tried = [s.quantizer for s in sites]
        with settings_restored(tried, only_on_error=True), quantized_once(self.model, math.inf):
            yield


def _sites(sim: Any) -> Iterator[Site]:
    known: set[int] = set()
    for name, module in sim.named_qmodules():
        outputs = activation_quantizers(module, "output")
        for side, quantizers in (("", outputs), ("input", activation_quantizers(module, "input"))):
            for place, q in enumerate(quantizers):
                one_range = isinstance(q, QuantizeDequantize) and not q.shape
                if not one_range or id(q) in known:
                    continue
                known.add(id(q))
                label = f" ({side or 'output'} {place})" if side or len(outputs) > 1 else ""
                yield Site(name + label, q)


def set_range(q: QuantizeDequantize, low: float, high: float) -> None:
    """Give a quantizer a range; 0 is put inside, and a symmetric one is made symmetric."""
    low, high = min(low, 0.0), max(high, 0.0)
    if q.symmetric:
        steps = q.qmax - q.qmin
        scale = max(high / math.floor(steps / 2), -low / math.ceil(steps / 2))
        low, high = -scale * math.ceil(steps / 2), scale * math.floor(steps / 2)
    q.set_range(low, high)


def set_output_bits(sim: Any, patterns: Iterable[str], bits: int) -> list[str]:
    """Give the outputs that have a quantizer, of modules that a pattern names, other bits.

    Returns:
        Names of these modules.
    """
    patterns = tuple(patterns)
    changed = []
    for name, module in sim.named_qmodules():
        if any(fnmatch.fnmatchcase(name, p) for p in patterns) and module.output_quantizers[0]:
            module.output_quantizers[0].bitwidth = bits
            changed.append(name)
    return changed


def interval(range_: tuple[float, float]) -> str:
    """A range as tables show it."""
    return f"[{range_[0]:.5g}, {range_[1]:.5g}]"


@contextmanager
def settings_restored(
    quantizers: Iterable[QuantizeDequantize], only_on_error: bool = False
) -> Iterator[None]:
    """Give quantizers back their bits and ranges.

    Args:
        quantizers: the quantizers to watch over.
        only_on_error: keep what was set unless the context ends with an exception.
    """
    quantizers = list(quantizers)
    bits = [q.bitwidth for q in quantizers]

    def undo() -> None:
        for q, width in zip(quantizers, bits, strict=True):
            q.bitwidth = width

    with restored(quantizers, only_on_error), undone(undo, only_on_error):
        yield


def loss_with(trials: Trials, site: Site, change: Callable[[], None]) -> float:
    """The loss with one site changed; the change is undone."""
    with settings_restored([site.quantizer]):
        change()
        return trials.loss()
