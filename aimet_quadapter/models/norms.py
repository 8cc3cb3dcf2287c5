"""`nn.RMSNorm` as one operation for AIMET."""

from __future__ import annotations

from typing import Any

from aimet_torch.nn import QuantizationMixin
from aimet_torch.onnx_utils import map_torch_types_to_onnx
from torch import Tensor, nn

from .copies import check_module


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


def rms_norm(source: Any, expected: type[nn.Module], eps: float) -> nn.RMSNorm:
    """HuggingFace's RMSNorm → torch's, which AIMET can treat as one operation.

    Raises:
        UnsupportedModelError: see `check_module`.
    """
    check_module(source, expected)
    norm = nn.RMSNorm(source.weight.shape, eps=eps, device="meta")
    norm.weight = nn.Parameter(source.weight.detach().clone())
    return norm
