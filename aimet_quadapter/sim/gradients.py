"""Fake quantization with gradients on a CPU, a part of a tensor at a time.

AIMET's function goes through memory some twenty times, by operations that torch does not vectorize
(comparisons, choices by a mask), and most of a step of phase 2 is this. Parts that stay in the
cache, and a mask made by the derivative of `hardtanh`, take a third of the time or less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from aimet_torch.experimental import pgs
from aimet_torch.quantization.affine.backends import torch_builtins
from aimet_torch.utils import patch_attr
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import CHANNEL, LARGEST, TENSOR

FUNCTION = "QuantDequantFunc"
"""What AIMET calls where a range has a gradient."""

PART = 1 << 15
"""Elements of a part for each thread, 2 of them at least: a few such tensors fit the cache."""

inside = torch.ops.aten.hardtanh_backward.grad_input
"""(x, r, low, high, grad_input=y): y = x where low < r < high, else 0."""


@contextmanager
def by_parts() -> Iterator[None]:
    """Let AIMET's fake quantization be computed by parts where it has a gradient.

    Outputs and the gradient of x are AIMET's to the bit; that of a range is a sum of the same
    numbers in another order. It is for float32 on a CPU where one offset holds for all ranges;
    anything else is AIMET's. Where x is NaN its gradient passes (AIMET: 0).
    """
    theirs = getattr(torch_builtins, FUNCTION, None)
    with ExitStack() as stack:
        if theirs is not None:  # else another AIMET
            stack.enter_context(patch_attr(torch_builtins, FUNCTION, _Learned(theirs)))
        stack.enter_context(patch_attr(torch, "fake_quantize_per_tensor_affine", _per_tensor))
        stack.enter_context(patch_attr(torch, "fake_quantize_per_channel_affine", _per_channel))
        yield


class _Learned:
    """In place of AIMET's function: ours where it fits, else theirs."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def apply(
        self, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, shift: float
    ) -> Tensor:
        y: Tensor
        rounds = torch_builtins._round_fn is torch.round and not pgs.is_pgs_enabled()
        if shift == 0 and rounds and _fits(x, scale, offset, qmin, qmax):
            y = _QuantizeDequantize.apply(x, scale, offset, qmin, qmax, False)
        else:
            y = self.theirs.apply(x, scale, offset, qmin, qmax, shift)
        return y


def _per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    if _fits(x, scale, zero_point, qmin, qmax) and qmin <= int(zero_point) <= qmax:
        y: Tensor = _QuantizeDequantize.apply(x, scale, -zero_point.float(), qmin, qmax, True)
        return y
    return TENSOR(x, scale, zero_point, qmin, qmax)


def _per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int
) -> Tensor:
    along = [1] * x.dim()
    along[axis] = -1
    if _fits(x, scale.view(along), zero_point, qmin, qmax) and qmin <= int(zero_point[0]) <= qmax:
        offset = -zero_point.float().view(along)
        y: Tensor = _QuantizeDequantize.apply(x, scale.view(along), offset, qmin, qmax, True)
        return y
    return CHANNEL(x, scale, zero_point, axis, qmin, qmax)


def _fits(x: Tensor, scale: object, offset: object, qmin: int, qmax: int) -> bool:
    """Whether it is computed here; torch refuses a zero point beyond the ends of the grid."""
    return (
        isinstance(scale, Tensor)
        and isinstance(offset, Tensor)
        and torch.is_grad_enabled()
        and (x.requires_grad or scale.requires_grad)
        and type(x) is Tensor
        and x.device.type == scale.device.type == offset.device.type == "cpu"
        and x.dtype == scale.dtype == torch.float32
        and x.numel() > 0
        and -LARGEST <= qmin <= qmax <= LARGEST
        and (scale.numel() == 1 or (x.is_contiguous() and scale.dim() <= x.dim()))
        and bool(offset.min() == offset.max())
    )


class _QuantizeDequantize(torch.autograd.Function):
    """y = s · (clip(r − o, qmin, qmax) + o), r = round(x / s); all integers o are the same.

    With G = ∂L/∂y and M = 1 where the clip changes nothing, else 0:

        ∂L/∂x = G · M,   ∂L/∂s = Σ G · (clip(r, qmin + o, qmax + o) − M · x / s),
        ∂L/∂o = Σ G · (1 − M) · s

    as AIMET computes them. With `fixed` the range has no gradient and x / s is x · (1 / s), as
    torch computes it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, fixed: bool
    ) -> Tensor:
        shift = float(offset.flatten()[0])
        ctx.save_for_backward(x, scale)
        ctx.fixed, ctx.low, ctx.high = fixed, qmin + shift, qmax + shift
        result = torch.empty_like(x)
        scales = _like(scale, x)
        for y, part, s in zip(*_parts(scales.shape, result, x, scales), strict=True):
            _divided(part, s, fixed, y)
            y.round_().sub_(shift).clamp_(qmin, qmax).add_(shift).mul_(s)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        clipped = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        of_x = torch.empty_like(x) if clipped else x
        scales = _like(scale, x)
        of_scale, of_offset = torch.zeros_like(scales), torch.zeros_like(scales)
        low, high = ctx.low, ctx.high
        columns = _parts(scales.shape, of_x, x, grads[0], scales, of_scale, of_offset)
        rows = list(zip(*columns, strict=True))
        memory = torch.empty(2, rows[0][0].numel())
        for gx, part, grad, s, gs, go in rows:
            q, r = (m[: part.numel()].view(part.shape) for m in memory)
            torch.round(_divided(part, s, ctx.fixed, q), out=r)
            if clipped:
                inside(grad, r, low - 0.5, high + 0.5, grad_input=gx)
            if ctx.fixed:
                continue
            inside(q, r, low - 0.5, high + 0.5, grad_input=q)
            r.clamp_(low, high).sub_(q)
            gs += _sum(r.mul_(grad), gs)
            if ctx.needs_input_grad[2]:
                go += _sum(torch.sub(grad, gx, out=q), go) * s
        learned = [None if ctx.fixed else g.view(scale.shape) for g in (of_scale, of_offset)]
        return of_x if clipped else None, *learned, None, None, None


def _divided(x: Tensor, scale: Tensor, fixed: bool, out: Tensor) -> Tensor:
    return torch.mul(x, scale.reciprocal(), out=out) if fixed else torch.div(x, scale, out=out)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    """The scale with as many dimensions as x, or with none."""
    if scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(*[1] * (x.dim() - scale.dim()), *scale.shape)


def _sum(x: Tensor, like: Tensor) -> Tensor:
    return x.sum() if like.dim() == 0 else x.sum_to_size(like.shape)


def _parts(shape: torch.Size, *tensors: Tensor) -> list[list[Tensor]]:
    """Each tensor cut into parts, the same elements in the same place of each list.

    Args:
        shape: () to cut the elements in the order they lie in memory; else to cut along the first
            dimension, tensors of size 1 there not at all.
        tensors: the first one, dense, says how they lie; it is cut in place.
    """
    first = tensors[0]
    part = PART * max(2, torch.get_num_threads())
    if not shape:
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        flat = [t.permute(order).reshape(-1) if t.dim() else t for t in tensors]
        cuts = -(-first.numel() // part)
        return [list(t.split(part)) if t.dim() else [t] * cuts for t in flat]
    rows = max(1, part * len(first) // first.numel())
    cuts = -(-len(first) // rows)
    return [list(t.split(rows)) if len(t) == len(first) else [t] * cuts for t in tensors]
