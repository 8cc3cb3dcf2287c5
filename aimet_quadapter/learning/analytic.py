"""Scales by formula for the same pairs: baselines, and where training may start.

AIMET's own cross-layer equalization changes nothing on a transformer (it looks for convolutions),
so its formula is applied here to our pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from aimet_torch.cross_layer_equalization import PythonClsImpl
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from ..errors import DataError
from ..pairs.pair import Pair, Scale, channel_dim
from ..sim.checks import check_sim
from ..sim.inputs import Sample
from ..sim.samples import as_samples
from .blocks import check_ways, ways

SILENT = 2.0**-16
"""Share of the loudest channel below which a channel is silent: less than a step of 16 bits."""


@dataclass(frozen=True)
class Evidence:
    """What calibration data and weights say of each channel of a pair, both of shape (channels,).

    Attributes:
        seen: max |X|, X what the consumers read.
        known: whether anything is known: not of a channel that stays below `SILENT` of the loudest
            on the calibration data, nor of one that no consumer has a weight for.
    """

    seen: Tensor
    known: Tensor


def analytic_alphas(
    sim: Any, calib_loader: Iterable[Any], pairs: Iterable[Pair], method: str
) -> dict[str, Tensor]:
    """α of every pair by a formula, for `fold(sim, pairs, alphas)`.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim the pairs were found in; it is not changed.
        calib_loader: yields inputs of the model.
        pairs: the pairs.
        method: "cle" or "smoothquant".

    Returns:
        pair name → α, shape (channels,).

    Raises:
        ValueError: the method is not known.
        SimError: not a sim, or its weights hold NaN or inf.
        DataError: the samples do not fit the model, or none runs one of the pairs.
    """
    methods = {"cle": cle, "smoothquant": smoothquant}
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(methods)}.")
    check_sim(sim, quantized=False)
    samples = as_samples(calib_loader, sim.model)
    chosen = tuple(pairs)
    check_ways(chosen, ways(sim, samples))
    found = evidence(sim.model, chosen, samples)
    return {p.name: methods[method](sim.model, p, found[p.name]) for p in chosen}


def evidence(
    model: nn.Module, pairs: Sequence[Pair], samples: Sequence[Sample]
) -> dict[str, Evidence]:
    """Pair name → what is known of its channels, from one pass of the unquantized model.

    Raises:
        DataError: no sample runs a pair.
    """
    seen: dict[str, Tensor] = {}

    def note(
        pair: Pair, columns: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        x = (*args, *kwargs.values())[0]
        view = [1] * x.dim()
        view[channel_dim(module, x.dim())] = -1
        found = channel_max(x, columns.reshape(view), pair.channels)
        before = seen.get(pair.name, torch.zeros_like(found))
        seen[pair.name] = torch.maximum(before.to(found.device), found)

    with ExitStack() as stack:
        for pair in pairs:
            for name, columns in zip(pair.consumers, pair.columns, strict=True):
                module = model.get_submodule(name)
                hook = partial(note, pair, columns)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(remove_all_quantizers(model))
        stack.enter_context(torch.no_grad())
        for sample in samples:
            sample(model)
    missing = [pair.name for pair in pairs if pair.name not in seen]
    if missing:
        raise DataError(
            f"no calibration sample runs the pair {missing[0]!r}. Add samples that do, or leave "
            "the pair out."
        )
    return {p.name: _evidence(model, p, seen[p.name]) for p in pairs}


def _evidence(model: nn.Module, pair: Pair, seen: Tensor) -> Evidence:
    read = weight_max(model, pair, divide=True).to(seen.device) > 0
    return Evidence(seen, read & (seen > SILENT * seen.max()))


def channel_max(tensor: Tensor, index: Tensor, channels: int) -> Tensor:
    """Max |tensor| over the places of each channel; shape (channels,).

    Args:
        tensor: any tensor.
        index: channel at each place, broadcastable to the tensor, −1 where there is none.
        channels: number of channels.
    """
    index = index.to(tensor.device)
    index = index.reshape(*[1] * (tensor.dim() - index.dim()), *index.shape)
    others = [dim for dim, size in enumerate(index.shape) if size == 1 and tensor.shape[dim] > 1]
    values = tensor.detach()
    if others:  # of one channel each: no copy of a large weight
        values = torch.maximum(
            values.amax(others, keepdim=True), -values.amin(others, keepdim=True)
        )
    places = index.expand(values.shape).flatten()
    places = torch.where(places >= 0, places, channels)
    result = tensor.new_zeros(channels + 1).float()
    return result.scatter_reduce(0, places, values.abs().flatten().float(), "amax")[:channels]


def weight_max(model: torch.nn.Module, pair: Pair, divide: bool) -> Tensor:
    """Max |W| of each channel on the producer's side, or over all consumers; (channels,)."""

    def of(scale: Scale) -> Tensor:
        weight = getattr(model.get_submodule(scale.module), scale.parameter)
        return channel_max(weight, scale.index, pair.channels)

    chosen = [s for s in pair.scales if s.divide == divide and s.parameter == "weight"]
    return torch.stack([of(s) for s in chosen]).amax(0)


def cle(model: nn.Module, pair: Pair, evidence: Evidence) -> Tensor:
    """Cross-layer equalization: α_c = √(r2_c / r1_c), r the weight ranges (Nagel et al., 2019).

    The formula is AIMET's (`PythonClsImpl.compute_scaling_params_for_conv`), which divides the
    producer by s = r1 / √(r1 · r2); α = 1 / s. A channel of which nothing is known is `neutral`.
    """
    first = weight_max(model, pair, divide=False)
    second = weight_max(model, pair, divide=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = PythonClsImpl.compute_scaling_params_for_conv(
            first.cpu().numpy().reshape(-1, 1, 1, 1), second.cpu().numpy().reshape(1, -1, 1, 1)
        )
    return neutral(torch.from_numpy(1 / s).to(first), evidence)


def smoothquant(model: nn.Module, pair: Pair, evidence: Evidence, strength: float = 0.5) -> Tensor:
    """SmoothQuant: 1/α_c = max|X_c|^m / max|W2_c|^(1−m) (Xiao et al., 2023).

    X is what the consumers read on the calibration data, m the migration strength. A channel of
    which nothing is known is `neutral`.
    """
    weight = weight_max(model, pair, divide=True)
    s = evidence.seen.to(weight) ** strength / weight ** (1 - strength)
    alpha = torch.where((s > 0) & s.isfinite(), 1 / s, torch.ones_like(s))
    return neutral(alpha, evidence)


def neutral(alpha: Tensor, evidence: Evidence) -> Tensor:
    """α with channels of which nothing is known put where a value of theirs costs what it would.

        α_c = max_k α_k X_k / max_k X_k,  k the channels of which something is known

    is the scaled activation's range over the unscaled one's. A silent channel that wakes is then
    clipped, and sets a range, just where it would without α, and has as many steps. The α of
    other channels is bounded by what was seen of them: α_c X_c stays within the scaled range, so
    α_c is at most 1 / `SILENT` times this.

    Args:
        alpha: α, shape (channels,).
        evidence: what is known of the channels.
    """
    seen, known = evidence.seen.to(alpha.device), evidence.known.to(alpha.device)
    if bool(known.all()) or not bool(known.any()):
        return alpha
    loudest = seen[known].max()
    level = (alpha * seen)[known].abs().max() / loudest
    return torch.where(known, alpha, level)
