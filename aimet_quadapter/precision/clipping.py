"""Which activation ranges to clip, found site by site by the loss of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..progress import progress
from ..sim.sites import Seen, Site, Trials, interval, loss_with, set_range

BULK = 0.9
"""Share of the rows that no choice clips."""

SPREAD = 2.0
"""A range that is less than this times wider than that of the bulk is left alone."""

COARSE = 4.0
"""Ratio of two limits that are tried one after the other; then once the half of it around the
best."""


@dataclass(frozen=True)
class RangeChoice:
    """One site whose range was looked at.

    Attributes:
        site: its name.
        was: range before (min, max).
        range: range now.
        tried: limit in absolute value → loss with it; the old range is not among them.
        before: loss with the old range and all earlier choices.
        loss: loss after.
    """

    site: str
    was: tuple[float, float]
    range: tuple[float, float]
    tried: dict[float, float]
    before: float
    loss: float


@dataclass(frozen=True)
class RangeChoices:
    """Result of `choose_ranges`.

    Attributes:
        choices: the sites that were looked at, in their order; those left as they were included.
        loss: the loss before.
        of: number of sites in question.
    """

    choices: tuple[RangeChoice, ...]
    loss: float
    of: int

    def __str__(self) -> str:
        lines = [f"{'site':<48} {'min-max':>19} {'chosen':>19} {'loss':>9} {'gain':>9}"]
        lines += [f"{'all as they were':<48} {'':>19} {'':>19} {self.loss:>9.4f}"]
        for c in self.choices:
            chosen = "as it was" if c.range == c.was else interval(c.range)
            lines.append(
                f"{c.site:<48} {interval(c.was):>19} {chosen:>19} {c.loss:>9.4f} "
                f"{c.before - c.loss:>9.4f}"
            )
        return "\n".join([*lines, f"{len(self.choices)} of {self.of} sites tried"])


def choose_ranges(
    sim: Any,
    calib_loader: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    candidates: int = 8,
    loss: str = "cross-entropy",
    min_gain: float = 1e-3,
) -> RangeChoices:
    """Clip the ranges of activations where the loss says that it helps, and nowhere else.

    One token's massive activation stretches a range until nothing is left for the others. Whether
    it may be clipped shows in no statistic of the tensor: at some sites clipping is right, at
    others it ruins the model. So every candidate is tried on the loss of the whole model, with
    limits c of

        min(c, max |x|),  c = max |x| / 2^k  down to what 90 % of the rows stay within,

    and keeps the best. Candidates are sites whose range is at least twice that of 90 % of their
    rows, the worst first by the mean relative error ‖Q(x) − x‖² / ‖x‖² of a row or a channel.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim of a causal language model, ranges set, α folded.
        calib_loader: yields inputs of the model; the loss is taken on all of them at each trial.
        sites: name patterns of the sites in question, such as `"*.down_proj"`; all by default.
        candidates: how many of the worst sites are tried.
        loss: "cross-entropy" of the text, or "distillation" from the unquantized model.
        min_gain: a range that lowers the loss by less is not taken; nats a token.

    Returns:
        What was tried and chosen; `print` shows the table.

    Raises:
        SimError: not a sim, or a range is not set.
        DataError: the samples do not fit the model, or no site fits the patterns.
        ValueError: `candidates` or `loss` is not possible.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it must be 1 or more.")
    trials = Trials(sim, calib_loader, loss)
    free = [s for s in trials.sites(sites) if s.quantizer.is_overwrite_allowed()]
    seen = trials.observe(free)
    stretched = [s for s in free if s.name in seen and _spread(seen[s.name]) >= SPREAD]
    worst = sorted(stretched, key=lambda s: -seen[s.name].error)[:candidates]
    with trials.search(worst):
        start = best = trials.start()
        choices: list[RangeChoice] = []
        for site in progress(worst, "choosing ranges"):
            choices.append(_choose(trials, site, seen[site.name], best, min_gain))
            best = choices[-1].loss
    return RangeChoices(tuple(choices), start, len(free))


def _spread(seen: Seen) -> float:
    bulk = seen.magnitude(BULK)
    return seen.magnitude(1.0) / bulk if bulk > 0 else 0.0


def _choose(trials: Trials, site: Site, seen: Seen, before: float, min_gain: float) -> RangeChoice:
    """Try the limits of one site and set the best."""
    q = site.quantizer
    was = (q.get_min().item(), q.get_max().item())
    tried = {}
    for limit in _limits(seen):
        tried[limit] = loss_with(trials, site, partial(_clip, site, seen, limit))
    nearest = min(tried, key=lambda c: tried[c])
    for limit in (nearest * COARSE**0.5, nearest / COARSE**0.5):
        if seen.magnitude(BULK) <= limit < seen.magnitude(1.0):
            tried[limit] = loss_with(trials, site, partial(_clip, site, seen, limit))
    best = min(tried, key=lambda c: tried[c])
    if before - tried[best] < min_gain:
        return RangeChoice(site.name, was, was, tried, before, before)
    _clip(site, seen, best)
    now = (q.get_min().item(), q.get_max().item())
    return RangeChoice(site.name, was, now, tried, before, tried[best])


def _limits(seen: Seen) -> Iterator[float]:
    bulk, limit = seen.magnitude(BULK), seen.magnitude(1.0) / COARSE
    while limit > bulk:
        yield limit
        limit /= COARSE
    yield bulk


def _clip(site: Site, seen: Seen, limit: float) -> None:
    low, high = seen.range
    set_range(site.quantizer, max(low, -limit), min(high, limit))
