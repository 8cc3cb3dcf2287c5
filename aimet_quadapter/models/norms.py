"""Norms, found by what they compute and not by what their class is called."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from aimet_torch.nn import BaseQuantizationMixin, QuantizationMixin
from aimet_torch.onnx_utils import map_torch_types_to_onnx
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from .widening import HALF, module_by_module_in_float32

TOLERANCE = 1e-4
"""|difference| of a norm's output in fp32 that counts as equal, of the largest."""


USUAL_EPS = {1e-5, 1e-6, 1e-8, 1e-12}
"""What is tried where a module holds no number that could be its eps."""


class QuantizedRMSNorm(QuantizationMixin, nn.RMSNorm):
    """`nn.RMSNorm` with quantizers at its input, its weight and its output.

    It stands at the top of a module, so that a sim can be pickled and saved by AIMET.
    """

    __quant_init__ = QuantizationMixin.__unary__
    input_quantizers: Any
    output_quantizers: Any

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizers[0]:
            x = self.input_quantizers[0](x)
        with self._patch_quantized_parameters():  # type: ignore[operator]
            y = super().forward(x)
        return self.output_quantizers[0](y) if self.output_quantizers[0] else y


if nn.RMSNorm not in QuantizationMixin.cls_to_qcls:  # AIMET 2.42 knows HuggingFace's norms only
    # Mapped before `implements`, which copies the ONNX type to the quantized class.
    map_torch_types_to_onnx[nn.RMSNorm] = ["RMSNormalization"]
    QuantizationMixin.implements(nn.RMSNorm)(QuantizedRMSNorm)


class Norm(NamedTuple):
    """weight' · (x − m) / √(v + eps) + bias, over the last dimension.

    Attributes:
        centred: m is the mean and v the variance (LayerNorm); else m = 0 and v is the mean square
            (RMSNorm).
        eps: added to v.
        offset: weight' = offset + weight; 1 where HuggingFace keeps weights around 0.
    """

    centred: bool
    eps: float
    offset: float

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The formula, in the dtype of `x`."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        y = y if weight is None else y * (weight + self.offset)
        return y if bias is None else y + bias


def norm_of(module: nn.Module) -> Norm | None:
    """What norm a module is, by trying it on vectors of usual and of tiny size; None for none.

    Args:
        module: any module; with AIMET's quantizers they are off while it is tried.
    """
    if module not in _KNOWN:
        shape = _shape(module)
        _KNOWN[module] = None if shape is None else _try(module, shape)
    return _KNOWN[module]


_KNOWN: WeakKeyDictionary[nn.Module, Norm | None] = WeakKeyDictionary()
"""What was tried before: what a module is does not change with its weights."""


def _shape(module: nn.Module) -> torch.Size | None:
    """Shape of the vectors that a module may norm: of its own parameters, or `normalized_shape`."""
    own = [t for name in ("weight", "bias") if (t := getattr(module, name, None)) is not None]
    others = any(True for _ in module.buffers(recurse=False)) or (
        not isinstance(module, BaseQuantizationMixin) and any(module.children())
    )
    if others or not all(isinstance(t, Tensor) for t in own):
        return None
    shapes = {t.shape for t in own} or {torch.Size(getattr(module, "normalized_shape", ()))}
    (shape, *more) = shapes
    return shape if not more and len(shape) == 1 else None


def _try(module: nn.Module, shape: torch.Size) -> Norm | None:
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    like = next((t for t in (weight, bias) if t is not None), torch.zeros(0))
    dtype = torch.float32 if like.dtype in HALF else like.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *shape, generator=generator).add(0.5)  # (B, T, C)
    x = x.to(device=like.device, dtype=dtype)
    inputs = torch.cat((x, 1e-3 * x))
    with (
        torch.no_grad(),
        in_eval_mode(module),
        remove_all_quantizers(module),
        module_by_module_in_float32(module),
    ):
        try:
            expected = module(inputs)
        except Exception:  # noqa: BLE001  not a function of vectors
            return None
        if not isinstance(expected, Tensor) or expected.shape != inputs.shape:
            return None
        weight, bias = (None if t is None else t.detach().to(dtype) for t in (weight, bias))
        for norm in _candidates(module):
            if _equal(norm.compute(inputs, weight, bias) - expected, expected):
                return norm
    return None


def _equal(difference: Tensor, expected: Tensor) -> bool:
    error = difference.abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-12)
    return bool((error <= TOLERANCE).all())


def _candidates(module: nn.Module) -> list[Norm]:
    small = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 1} or USUAL_EPS
    return [
        Norm(centred, eps, offset)
        for eps in sorted(small)
        for centred in (False, True)
        for offset in (0.0, 1.0)
    ]
