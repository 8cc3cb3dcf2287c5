"""Ranges of AIMET's quantizers: from the current batch with gradients, or off, for a while."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import flatten_nn_module_list, patch_attr
from torch import Tensor, nn

from ..progress import progress
from .checks import check_sim
from .samples import as_samples
from .weights import fine_grids_unsearched, quantized_once

LONG, PART = 1 << 16, 1 << 10
"""Length of a row that is looked through by parts, and that of a part at most."""

TINY = 1e-30
"""Keeps the width of a range that holds nothing but zero from dividing by zero."""


def activation_quantizers(module: nn.Module, side: str) -> list[QuantizerBase]:
    """A quantized module's quantizers at its "input" or "output"; none for a plain module."""
    if not isinstance(module, BaseQuantizationMixin):
        return []
    listed = flatten_nn_module_list(getattr(module, f"{side}_quantizers"))
    return [q for q in listed if isinstance(q, QuantizerBase)]


def weight_quantizers(module: nn.Module) -> list[QuantizerBase]:
    """A quantized module's parameter quantizers."""
    if not isinstance(module, BaseQuantizationMixin):
        return []
    return [q for q in module.param_quantizers.values() if isinstance(q, QuantizerBase)]


def all_quantizers(module: nn.Module) -> list[QuantizerBase]:
    """Every quantizer of a quantized module; none for a plain module."""
    sides = [*activation_quantizers(module, "input"), *activation_quantizers(module, "output")]
    return [*weight_quantizers(module), *sides]


class _BatchQuantizeDequantize(torch.autograd.Function):
    """Quantize-dequantize each row of (groups, n) by the row's own minimum and maximum.

        s = (max − min) / (qmax − qmin),  o = round(min / s) − qmin,  y = s · (clip(x/s − o) + o)

    with 0 always inside the range and, for a symmetric grid, the range stretched to the grid as
    AIMET's min-max analyzer does: the values are those of AIMET's own dynamic mode. The gradient
    passes the rounding straight through, and through s reaches the elements that are the minimum
    and the maximum (AIMET detaches them; block errors then stay 1.4 to 4 times higher):

        ∂L/∂s = Σ ∂L/∂y · (y − x) / s

    One function instead of AIMET's differentiable parts takes a third of the passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, qmin: int, qmax: int, symmetric: bool) -> Tensor:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        steps = qmax - qmin
        if symmetric:
            positive, negative = high / math.floor(steps / 2), -low / math.ceil(steps / 2)
            scale = torch.maximum(positive, negative).clamp(min=TINY)
            offset = torch.full_like(scale, -round((qmin + qmax) / 2))
            share_high = (positive >= negative).to(x) / math.floor(steps / 2)
            share_low = (positive < negative).to(x) / -math.ceil(steps / 2)
        else:
            scale = ((high - low) / steps).clamp(min=TINY)
            offset = (low / scale).round_() - qmin
            share_high = (high > 0).to(x) / steps
            share_low = (low < 0).to(x) / -steps
        y = (x / scale).round_().clamp_(qmin + offset, qmax + offset).mul_(scale)
        ctx.save_for_backward(x, y, scale, share_low, share_high)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, y, scale, share_low, share_high = ctx.saved_tensors
        (grad,) = grads
        of_scale = ((y - x).mul_(grad)).sum(1, keepdim=True) / scale
        result = grad.clone()
        result.scatter_add_(1, _first(x, torch.argmin, torch.amin), of_scale * share_low)
        result.scatter_add_(1, _first(x, torch.argmax, torch.amax), of_scale * share_high)
        return result, None, None, None


def _first(x: Tensor, where: Callable[..., Tensor], value: Callable[..., Tensor]) -> Tensor:
    """Where the first of the smallest or largest of each row is, (rows, 1).

    In a long row by parts: on a CPU `amin` is many times as fast as `argmin`.
    """
    if x.shape[1] < LONG:
        return where(x, 1, keepdim=True)
    part = max(n for n in range(1, PART + 1) if x.shape[1] % n == 0)
    parts = x.unflatten(1, (-1, part))
    first = where(value(parts, 2), 1, keepdim=True)
    return first * part + where(parts.take_along_dim(first[..., None], 1), 2)


def batch_quantize_dequantize(x: Tensor, q: QuantizeDequantize) -> Tensor:
    """`x` quantized by `q`'s grid with the range of `x` itself, differentiable through the range.

    Args:
        x: any tensor that `q` could quantize, or some of its channels.
        q: one range for all, or one a channel along one dimension.
    """
    padded = (*[1] * (x.dim() - len(q.shape)), *q.shape)
    axes = [d for d, n in enumerate(padded) if n != 1]
    rows = x.float().reshape(1, -1)
    if axes:
        rows = x.float().movedim(axes[0], 0).reshape(x.shape[axes[0]], -1)
    y: Tensor = _BatchQuantizeDequantize.apply(rows, q.qmin, q.qmax, q.symmetric)
    if not axes:
        return y.reshape(x.shape).to(x.dtype)
    moved = x.movedim(axes[0], 0).shape
    return y.reshape(moved).movedim(0, axes[0]).to(x.dtype)


def is_dynamic(q: QuantizerBase) -> bool:
    """Whether phase 1 may take this quantizer's range from the batch.

    Ranges that AIMET's config fixes (softmax in [0, 1]) and quantizers that are not integer
    keep the range they have.
    """
    return isinstance(q, QuantizeDequantize) and q.is_overwrite_allowed()


@contextmanager
def dynamic(
    quantizers: Iterable[QuantizerBase],
    observe: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Let quantizers take their range from every tensor they see.

    Block-wise quantizers use AIMET's own dynamic mode, whose range has no gradient.

    Args:
        quantizers: quantizers whose range is free; others are left alone.
        observe: called with every tensor such a quantizer sees.
    """
    with ExitStack() as stack:
        for q in quantizers:
            if not is_dynamic(q):
                continue
            if q.block_size is not None or sum(n != 1 for n in q.shape) > 1:
                stack.enter_context(_aimet_dynamic(q))
            else:
                stack.enter_context(patch_attr(q, "forward", _batch_forward(q, observe)))
        yield


@contextmanager
def _aimet_dynamic(q: QuantizeDequantize) -> Iterator[None]:
    """AIMET's dynamic mode, without the new range it would leave behind."""
    with restored([q]), q.compute_encodings():
        yield


@contextmanager
def undone(undo: Callable[[], None], only_on_error: bool = False) -> Iterator[None]:
    """Call `undo` when the context ends.

    Args:
        undo: puts back what the context may change.
        only_on_error: only when the context ends with an exception, Ctrl-C included.
    """
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and only_on_error):
            undo()


@contextmanager
def restored(quantizers: Iterable[QuantizerBase], only_on_error: bool = False) -> Iterator[None]:
    """Give quantizers back the ranges they had, and whether they had any.

    Args:
        quantizers: the quantizers to watch over.
        only_on_error: keep the new ranges unless the context ends with an exception.
    """
    before = [
        (q, name, p.detach().clone(), p.requires_grad, q._is_initialized(name, p))
        for q in quantizers
        for name, p in q.named_parameters(recurse=False)
    ]

    def undo() -> None:
        for q, name, value, requires_grad, initialized in before:
            parameter = getattr(q, name)
            parameter.data.copy_(value)
            parameter.requires_grad_(requires_grad)
            if not initialized:
                q._initial_parameters[name] = (weakref.ref(parameter), parameter._version)

    with undone(undo, only_on_error):
        yield


@contextmanager
def placeholders(quantizers: Iterable[QuantizerBase]) -> Iterator[None]:
    """Give quantizers without a range some range for a while.

    AIMET computes the range of a weight that has none as soon as its module runs; phase 1 takes
    ranges from the batch and has no use for that.
    """
    quantizers = list(quantizers)
    with restored(quantizers):
        for q in quantizers:
            if isinstance(q, QuantizeDequantize) and not q.is_initialized():
                q.set_range(-1.0, 1.0)
        yield


def _batch_forward(
    q: QuantizeDequantize, observe: Callable[[Tensor], None] | None
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if observe is not None:
            observe(x)
        return batch_quantize_dequantize(x, q) if x.numel() else x  # an expert without tokens

    return forward


@contextmanager
def off(quantizers: Iterable[QuantizerBase]) -> Iterator[None]:
    """Let quantizers pass everything through for a while."""
    with ExitStack() as stack:
        for q in quantizers:
            stack.enter_context(patch_attr(q, "forward", _identity))
        yield


def _identity(x: Tensor) -> Tensor:
    return x


def set_ranges(sim: Any, calib_loader: Iterable[Any]) -> None:
    """AIMET's `compute_encodings` over all samples; ranges that are fixed stay.

    A weight of more than 8 bits gets min-max: `fine_grids_unsearched` says why.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim.
        calib_loader: yields inputs of the model, as in `apply_quadapter`.

    Raises:
        SimError: not a sim, or its weights hold NaN or inf.
        DataError: the samples do not fit the model.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    check_sim(sim, quantized=False)
    samples = as_samples(calib_loader, sim.model)

    def run(model: torch.nn.Module) -> None:
        with quantized_once(model):  # AIMET has set the ranges of weights by now
            for _, sample in zip(progress(len(samples), "setting ranges"), samples, strict=True):
                sample(model)

    with restored(list(sim.quantizers()), only_on_error=True), fine_grids_unsearched():
        sim.compute_encodings(run)
