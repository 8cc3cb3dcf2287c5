"""Bits: of the residual stream, of some weights, of the few activations that need more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import SimError
from ..models.decoder import PreparedDecoder
from ..models.norms import norm_of
from ..progress import progress
from ..sim.checks import check_sim
from ..sim.sites import Seen, Site, Trials, loss_with, set_output_bits, set_range

SECOND_LOOK = 8
"""Sites that are tried again after each choice: the best of the first round."""


def set_residual_bits(sim: Any, bits: int = 16) -> list[str]:
    """Give the residual stream other bits: the sums that are it, and what is added in them.

    A Llama's massive activations live there (Sun et al., 2024), where no α may scale, and every
    layer's rounding stays. Outputs only; a quantizer that is off stays off, and a range stays what
    it was, to within a step. The architecture says which modules these are (`residual_writers`,
    `residual_sums`).

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim of a prepared model.
        bits: what they get.

    Returns:
        Names of the modules whose output has these bits now.

    Raises:
        SimError: not a sim, or not of a model that `prepare` made.
        ValueError: `bits` is not possible.
    """
    check_sim(sim)
    _check_bits(bits, 4)
    model = sim.model
    if not isinstance(model, PreparedDecoder):
        raise SimError(
            f"{type(model).__name__} does not say what its residual stream is. Make the sim of "
            "prepare(model), or set output_quantizers[0].bitwidth of its modules yourself."
        )
    return set_output_bits(sim, (*model.residual_writers, *model.residual_sums), bits)


def set_table_bits(sim: Any, bits: int = 8) -> list[str]:
    """Give the weights of embeddings and head other bits: with 4 they lose most.

    AIMET's own recipes for 4-bit weights leave these at 8. What becomes of NaN, another device,
    half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim. Of a model that `prepare` did not make the head is not known, and is
            left as it is.
        bits: what they get; a quantizer that is off stays off.

    Returns:
        Names of the modules whose weight has these bits now.

    Raises:
        SimError: not a sim.
        ValueError: `bits` is not possible.
    """
    check_sim(sim)
    head = sim.model.part("head") if isinstance(sim.model, PreparedDecoder) else None
    return _set_weight_bits(sim, lambda m: m is head or isinstance(m, nn.Embedding), bits)


def set_norm_weight_bits(sim: Any, bits: int = 16) -> list[str]:
    """Give the weights of norms other bits: one range holds all channels of a norm.

    No α reaches those of a norm behind a branch (Gemma 3). The HTP takes 16 bits of an RMSNorm's
    weight beside activations of 16 bits, and refuses them beside 8. What becomes of NaN, another
    device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim.
        bits: what they get; a quantizer that is off stays off.

    Returns:
        Names of the modules whose weight has these bits now.

    Raises:
        SimError: not a sim.
        ValueError: `bits` is not possible.
    """
    check_sim(sim)
    return _set_weight_bits(sim, lambda m: norm_of(m) is not None, bits)


def _set_weight_bits(sim: Any, wanted: Callable[[nn.Module], bool], bits: int) -> list[str]:
    _check_bits(bits, 4)
    changed = []
    for name, module in sim.named_qmodules():
        quantizer = dict(module.param_quantizers).get("weight")
        if quantizer is not None and wanted(module):
            quantizer.bitwidth = bits
            changed.append(name)
    return changed


@dataclass(frozen=True)
class BitChoice:
    """One site that was given more bits.

    Attributes:
        site: its name.
        bits: bits it has now.
        was: bits it had.
        loss: loss of the model with this and all earlier choices.
        gain: how far this choice lowered the loss.
        error: mean relative error of a row or channel of its tensor at the old bits.
    """

    site: str
    bits: int
    was: int
    loss: float
    gain: float
    error: float


@dataclass(frozen=True)
class BitAssignment:
    """Result of `assign_bits`.

    Attributes:
        choices: the sites that were given more bits, in the order of their choice.
        loss: the loss before.
        tried: site → loss with that site alone at the new bits, best first.
        of: number of sites in question.
    """

    choices: tuple[BitChoice, ...]
    loss: float
    tried: dict[str, float]
    of: int

    def __str__(self) -> str:
        lines = [f"{'site':<48} {'bits':>8} {'error':>10} {'loss':>9} {'gain':>9}"]
        lines += [f"{'all as they were':<48} {'':>8} {'':>10} {self.loss:>9.4f}"]
        lines += [
            f"{c.site:<48} {f'{c.was}→{c.bits}':>8} {c.error:>10.4f} {c.loss:>9.4f} {c.gain:>9.4f}"
            for c in self.choices
        ]
        others = [name for name in self.tried if name not in {c.site for c in self.choices}]
        lines += [
            f"{'alone: ' + name:<48} {'':>8} {'':>10} {self.tried[name]:>9.4f} "
            f"{self.loss - self.tried[name]:>9.4f}"
            for name in others[:5]
        ]
        return "\n".join([*lines, f"{len(self.tried)} of {self.of} sites tried"])


def assign_bits(
    sim: Any,
    calib_loader: Iterable[Any],
    budget: int,
    *,
    bits: int = 16,
    sites: Iterable[str] | None = None,
    candidates: int = 24,
    loss: str = "cross-entropy",
    min_gain: float = 1e-3,
) -> BitAssignment:
    """Give up to `budget` activation quantizers more bits, those that lower the loss most.

    A language model has a few tensors with massive activations (Sun et al., 2024): one token
    stretches the range and every other one is rounded to nothing. The sites are ranked by the
    mean relative error ‖Q(x) − x‖² / ‖x‖² of a row or of a channel. The worst are tried one at a
    time on the loss of the whole model, the best is kept, and the next is looked for with it in
    place. A chosen site gets the whole range that it sees. AIMET's `choose_mixed_precision` looks
    for the cheapest network above an accuracy; this for the best one within a number of sites.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim of a causal language model, ranges set, α folded.
        calib_loader: yields inputs of the model; the loss is taken on all of them at each trial.
        budget: largest number of sites to change, 1 or more.
        bits: what they get.
        sites: name patterns of the sites in question, such as `"*.down_proj"`; all by default.
        candidates: how many of the worst sites are tried.
        loss: "cross-entropy" of the text, or "distillation" from the unquantized model.
        min_gain: a site that lowers the loss by less is not worth its bits; nats a token.

    Returns:
        What was chosen and what each site would have brought; `print` shows the table.

    Raises:
        SimError: not a sim, or a range is not set.
        DataError: the samples do not fit the model, or no site fits the patterns.
        ValueError: `budget`, `bits`, `candidates` or `loss` is not possible.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    for name, value in (("budget", budget), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    _check_bits(bits, 5)
    trials = Trials(sim, calib_loader, loss)
    narrow = [s for s in trials.sites(sites) if s.quantizer.bitwidth < bits]
    seen = trials.observe(narrow)
    worst = sorted((s for s in narrow if s.name in seen), key=lambda s: -seen[s.name].error)
    worst = worst[:candidates]
    with trials.search(worst):
        start = trials.start()
        tried: dict[str, float] = {}
        choices: list[BitChoice] = []
        best, open_sites = start, worst
        while open_sites and len(choices) < budget:
            round_ = _round(trials, open_sites, seen, bits, len(choices) + 1)
            tried = tried or dict(sorted(round_.items(), key=lambda item: item[1]))
            site, *others = sorted(open_sites, key=lambda s: round_[s.name])
            gain = best - round_[site.name]
            if gain < min_gain:
                break
            was, best = site.quantizer.bitwidth, round_[site.name]
            _widen(site, seen[site.name], bits)
            choices.append(BitChoice(site.name, bits, was, best, gain, seen[site.name].error))
            open_sites = others[:SECOND_LOOK]
    return BitAssignment(tuple(choices), start, tried, len(narrow))


def _check_bits(bits: int, least: int) -> None:
    if not least <= bits <= 32:
        raise ValueError(f"bits is {bits}; {least} … 32 bits are possible, 16 is usual.")


def _round(
    trials: Trials, sites: list[Site], seen: dict[str, Seen], bits: int, number: int
) -> dict[str, float]:
    """Site → the loss with it, besides what is chosen already, at the new bits."""
    return {
        site.name: loss_with(trials, site, partial(_widen, site, seen[site.name], bits))
        for site in progress(sites, f"trying {bits} bits, choice {number}")
    }


def _widen(site: Site, seen: Seen, bits: int) -> None:
    site.quantizer.bitwidth = bits
    if site.quantizer.is_overwrite_allowed():
        set_range(site.quantizer, *seen.range)
