"""What every prepared decoder has: attention as modules, the mask, `generate`, the registry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from aimet_torch.adascale.adascale_optimizer import (
    AdaScaleModelConfig,
    adascale_model_config_dict,
)
from aimet_torch.nn import QuantizationMixin
from aimet_torch.nn.modules.custom import Add, MatMul, Multiply
from aimet_torch.onnx_utils import map_torch_types_to_onnx
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..errors import UnsupportedModelError

MASK_VALUE = -50.0
"""Added to the score of a position that must not be seen.

`exp(-50)` is 2e-22: masked positions vanish as long as the scores of a row spread by less than
about 30. HuggingFace adds the smallest float instead, which leaves no step of an 8-bit range for
the scores themselves.
"""


class SiLU(nn.Module):
    """x · sigmoid(x), the two operations a device runs; ONNX has no SiLU before opset 24.

    With `nn.SiLU` the exported Sigmoid carries no encoding.
    """

    module_site = "mul"
    """The operation that stands for the whole where AIMET's own sites are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.mul = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        return self.mul(x, self.sigmoid(x))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": SiLU,
    "swish": SiLU,
}
"""HuggingFace's name of an activation function → the torch module AIMET can quantize."""


def _register_rms_norm() -> None:
    """Tell AIMET that `nn.RMSNorm` is one operation with one output and a quantized weight.

    AIMET 2.42 knows HuggingFace's norm classes but not torch's own. The ONNX type must be mapped
    before `implements`, which copies it to the quantized class.
    """
    if nn.RMSNorm in QuantizationMixin.cls_to_qcls:
        return
    map_torch_types_to_onnx[nn.RMSNorm] = ["RMSNormalization"]

    class QuantizedRMSNorm(QuantizationMixin, nn.RMSNorm):
        """`nn.RMSNorm` with quantizers at its input, its weight and its output."""

        __quant_init__ = QuantizationMixin.__unary__
        input_quantizers: Any
        output_quantizers: Any

        def forward(self, x: Tensor) -> Tensor:
            if self.input_quantizers[0]:
                x = self.input_quantizers[0](x)
            with self._patch_quantized_parameters():  # type: ignore[operator]
                y = super().forward(x)
            return self.output_quantizers[0](y) if self.output_quantizers[0] else y

    QuantizationMixin.implements(nn.RMSNorm)(QuantizedRMSNorm)


_register_rms_norm()


class Cache(Protocol):
    """Keys and values of earlier tokens, as HuggingFace's `Cache`, one call a layer."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values (B, K, T, D); all to attend to, (B, K, S, D)."""
        ...


class Attention(nn.Module):
    """softmax(scale · QKᵀ + mask) · V, each operation a module of its own.

    Args:
        n_heads: query heads H.
        scale: factor of the scores, usually 1/√(head size).
    """

    scale: Tensor

    def __init__(self, n_heads: int, scale: float) -> None:
        super().__init__()
        # One equal factor a head: AIMET leaves a product with a scalar constant unquantized,
        # and a device operation without an encoding falls back to the CPU.
        self.register_buffer("scale", torch.full((max(n_heads, 2), 1, 1), scale)[:n_heads])
        self.qk = MatMul()
        self.scale_scores = Multiply()
        self.add_mask = Add()
        self.softmax = nn.Softmax(dim=-1)
        self.av = MatMul()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = self.scale_scores(self.qk(q, k.transpose(-1, -2)), self.scale)  # (B, H, T, S)
        probs = self.softmax(self.add_mask(scores, mask))
        return self.av(probs, v)  # (B, H, T, D)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, H·D) → (B, H, T, D)."""
    return x.reshape(x.shape[0], x.shape[1], n_heads, x.shape[2] // n_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H·D)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """(B, K, T, D) → (B, K·times, T, D): each key/value head serves `times` query heads."""
    if times == 1:
        return x
    b, k, t, d = x.shape
    return x[:, :, None].expand(b, k, times, t, d).reshape(b, k * times, t, d)


def additive_mask(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask that is added to the scores, (B or 1, 1, T, T): 0, or `MASK_VALUE` where hidden.

    It is made of the model's inputs alone. For a device pass it as an input of its own (4-D,
    returned as it is) or leave it out: the causal mask of a fixed length is a constant.

    Args:
        attention_mask: see `PreparedDecoder.forward`.
        like: hidden states (B, T, C), for length, dtype and device.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.is_floating_point():
            return attention_mask.to(like.dtype)
        return (attention_mask == 0).to(like.dtype) * MASK_VALUE
    position = torch.arange(like.shape[1], device=like.device)
    hidden = (position[None, :] > position[:, None])[None, None]  # (1, 1, T, T)
    if attention_mask is not None:
        hidden = hidden | (attention_mask[:, None, None, :] == 0)
    return hidden.to(like.dtype) * MASK_VALUE


class _Generator(PreTrainedModel, GenerationMixin):
    """HuggingFace's text generation over a prepared decoder, without a cache."""

    main_input_name = "input_ids"

    def __init__(self, decoder: PreparedDecoder) -> None:
        config = copy.deepcopy(decoder.config)
        config._attn_implementation = "eager"  # it has no attention of its own to choose for
        super().__init__(config)
        self._decoder = [decoder]  # in a list: not a submodule, nothing is copied or moved

    @property
    def device(self) -> torch.device:
        return next(self._decoder[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._decoder[0].parameters()).dtype

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self._decoder[0](input_ids, attention_mask, position_ids))


class PreparedDecoder(nn.Module):
    """A causal language model in which every device operation is a module AIMET can quantize.

    Subclasses hold one architecture each and are registered under the HuggingFace class they
    stand for (`@register`). Dropout is left out: a prepared model has no training-mode noise.
    """

    hf_class: ClassVar[str]
    """Name of the HuggingFace class, as `type(model).__name__` says it."""
    default_kinds: ClassVar[tuple[str, ...]]
    """Kinds of pairs that `apply_quadapter` uses unless told otherwise."""
    residual_writers: ClassVar[tuple[str, ...]]
    """Patterns of the modules whose output is added to the residual stream."""
    residual_sums: ClassVar[tuple[str, ...]]
    """Patterns of the sums that are the residual stream."""
    block_class: ClassVar[type[nn.Module]]
    """One decoder block, for techniques that go block by block, such as AIMET's AdaScale."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.generation_config: Any = None

    @classmethod
    def missing(cls, config: Any) -> list[str]:
        """What of this configuration is not supported, in words; empty when all is."""
        raise NotImplementedError

    @classmethod
    def from_hf(cls, model: Any) -> PreparedDecoder:
        """Build the equal prepared model; copies the weights, leaves `model` as it is."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Token ids (B, T) → logits (B, T, V).

        Args:
            input_ids: token ids (B, T).
            attention_mask: 1 where a token counts and 0 where it is padding (B, T); or an
                additive float mask (B or 1, 1, T, S) used as it is, S = T without a cache; or a
                bool mask of that shape, true where a position is seen.
            position_ids: positions (B, T); 0 … T−1 when not given, as HuggingFace does.
            cache: gives each layer the keys and values of earlier tokens; a cache that holds some
                needs a 4-D mask and `position_ids`.
        """
        raise NotImplementedError

    def dummy_input(self, batch: int = 1, length: int = 8) -> tuple[Tensor]:
        """Token ids (batch, length), the same at every call, for tracing and export."""
        ids = torch.arange(batch * length).reshape(batch, length) * 7 + 11
        return ((ids % self.config.vocab_size).to(next(self.parameters()).device),)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' `generate` on this model; same arguments, same tokens, no cache."""
        generator: Any = _Generator(self)
        if self.generation_config is not None:
            generator.generation_config = self.generation_config
        return generator.generate(*args, use_cache=False, **kwargs)


ARCHITECTURES: dict[str, type[PreparedDecoder]] = {}


def register(cls: type[PreparedDecoder]) -> type[PreparedDecoder]:
    """Make an architecture known to `prepare` under the HuggingFace class it stands for.

    And to AIMET's AdaScale, which finds a model's blocks by their class and, of a class that it
    does not know, changes nothing without a word.
    """
    ARCHITECTURES[cls.hf_class] = cls
    adascale_model_config_dict[cls] = AdaScaleModelConfig(block_type=cls.block_class)
    return cls


def activation(name: str) -> nn.Module:
    """The module of an activation function by HuggingFace's name."""
    return ACTIVATIONS[name]()


def missing_activation(name: str) -> list[str]:
    """A line for `PreparedDecoder.missing` when an activation function is not known."""
    if name in ACTIVATIONS:
        return []
    return [f"activation function {name!r} (known: {', '.join(sorted(ACTIVATIONS))})"]


def check_module(source: nn.Module, expected: type[nn.Module]) -> None:
    """Refuse a layer that does not compute what a plain `expected` does.

    Raises:
        UnsupportedModelError: `source` is not exactly `expected`, or its forward is patched: an
            adapter or another quantizer sits in its place.
    """
    patched = "forward" in vars(source) and not hasattr(source, "_hf_hook")  # accelerate's is fine
    if type(source) is expected and not patched:
        return
    found = "a patched forward" if patched else f"a {type(source).__name__}"
    raise UnsupportedModelError(
        f"found {found} where a plain {expected.__name__} was expected: an adapter or another "
        "quantizer is in its place. Merge adapters and load the model in fp32, bf16 or fp16 first."
    )


def copy_module(source: nn.Module, expected: type[nn.Module]) -> nn.Module:
    """A copy of a plain torch module, with weights of its own and without hooks.

    Raises:
        UnsupportedModelError: see `check_module`.
    """
    check_module(source, expected)
    module = copy.deepcopy(source)
    for name in ("forward", "_old_forward", "_hf_hook"):  # would go around AIMET's quantizers
        vars(module).pop(name, None)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module


def rms_norm(source: Any, expected: type[nn.Module], eps: float) -> nn.RMSNorm:
    """HuggingFace's RMSNorm → torch's, which AIMET can treat as one operation.

    Raises:
        UnsupportedModelError: see `check_module`.
    """
    check_module(source, expected)
    norm = nn.RMSNorm(source.weight.shape, eps=eps, device="meta")
    norm.weight = nn.Parameter(source.weight.detach().clone())
    return norm
