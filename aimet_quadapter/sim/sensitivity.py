"""Which activation quantizers cost the most: their error, and what the loss makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode
from torch import Tensor

from ..progress import progress
from .losses import cross_entropy
from .sites import Seen, Site, Trials
from .weights import frozen, quantized_once


@dataclass(frozen=True)
class SiteCost:
    """What one activation quantizer costs.

    Attributes:
        site: its name.
        bits: its bits.
        error: mean relative error of a row, or of a channel if that is larger (`Seen.error`).
        cost: Σ over rows of |gᵀ (Q(x) − x)|, g the gradient of the loss: how far the rounding of
            this site alone moves the loss, to first order, if the rows' parts do not cancel; nats
            a token.
    """

    site: str
    bits: int
    error: float
    cost: float


def site_costs(sim: Any, loader: Iterable[Any]) -> list[SiteCost]:
    """Error × sensitivity of every activation quantizer, largest first.

    One forward and one backward pass a sample, whatever the number of quantizers. The sim is left
    as it is.

    Args:
        sim: an AIMET sim of a causal language model, its ranges set.
        loader: yields inputs of the model.

    Raises:
        SimError: not a sim, or a range is not set.
        DataError: the samples do not fit the model.
    """
    trials = Trials(sim, loader, "cross-entropy")
    sites = trials.sites()
    model = trials.model
    seen = {site.name: Seen() for site in sites}
    costs = {site.name: 0.0 for site in sites}
    handles = [_watched(site, seen[site.name], costs) for site in sites]
    try:
        with frozen(model), in_eval_mode(model), quantized_once(model):
            for sample in progress(trials.samples, "costs of sites"):
                loss = cross_entropy(model, sample) / len(trials.samples)
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    found = [
        SiteCost(s.name, s.quantizer.bitwidth, seen[s.name].error, costs[s.name])
        for s in sites
        if seen[s.name].low
    ]
    return sorted(found, key=lambda one: -one.cost)


def _watched(site: Site, seen: Seen, costs: dict[str, float]) -> Any:
    def see(quantizer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen(quantizer, args, output)
        error = (output - args[0]).detach()
        if not output.requires_grad:  # nothing before it has a gradient: all weights are frozen
            output.requires_grad_()

        def add(gradient: Tensor) -> None:
            parts = (gradient * error).float().sum(-1)
            costs[site.name] += float(torch.nan_to_num(parts).abs().sum())

        output.register_hook(add)

    return site.quantizer.register_forward_hook(see)
