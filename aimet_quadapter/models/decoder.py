"""What every prepared decoder has: its forward, `generate`, and the registry of architectures."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from aimet_torch.adascale.adascale_optimizer import (
    AdaScaleModelConfig,
    adascale_model_config_dict,
)
from torch import Tensor, nn

from .attention import MASK_VALUE, Cache, additive_mask
from .generation import HuggingFaceGenerator


class Body(nn.Module):
    """Embeddings, blocks and the final norm: token ids (B, T) → hidden states (B, T, C)."""

    blocks: ClassVar[str]
    """Name of the list of blocks; each takes (x, mask, cache) and what `embed` gives it besides."""
    final_norm: ClassVar[str]
    """Name of the norm behind the last block."""
    mask_value: float = MASK_VALUE
    """Added to the score of a position that must not be seen."""

    def embed(self, ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states (B, T, C), and what every block takes by name besides."""
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        x, of_positions = self.embed(ids, position_ids)
        mask = additive_mask(attention_mask, x, self.mask_value)
        for block in getattr(self, self.blocks):
            x = block(x, mask=mask, cache=cache, **of_positions)
        return getattr(self, self.final_norm)(x)


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
    body: ClassVar[str]
    """Name of the `Body`, as HuggingFace names it; `lm_head` follows it."""
    block_class: ClassVar[type[nn.Module]]
    """One decoder block, for techniques that go block by block, such as AIMET's AdaScale."""

    lm_head: nn.Module

    def __init__(self, hf: Any) -> None:
        """Build the equal prepared model; copies the weights, leaves `hf` as it is."""
        super().__init__()
        self.config = copy.deepcopy(hf.config)
        self.generation_config: Any = None

    @classmethod
    def missing(cls, config: Any) -> list[str]:
        """What of this configuration is not supported, in words; empty when all is."""
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
        hidden = getattr(self, self.body)(input_ids, attention_mask, position_ids, cache)
        return self.lm_head(hidden)

    @property
    def mask_value(self) -> float:
        """Added to the score of a position that must not be seen; chosen by `prepare`."""
        value: float = getattr(self, self.body).mask_value
        return value

    @mask_value.setter
    def mask_value(self, value: float) -> None:
        getattr(self, self.body).mask_value = value

    def dummy_input(self, batch: int = 1, length: int = 8) -> tuple[Tensor]:
        """Token ids (batch, length), the same at every call, for tracing and export."""
        ids = torch.arange(batch * length).reshape(batch, length) * 7 + 11
        return ((ids % self.config.vocab_size).to(next(self.parameters()).device),)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' `generate` on this model; same arguments, same tokens, no cache."""
        generator: Any = self.as_huggingface()
        return generator.generate(*args, **kwargs | {"use_cache": False})

    def as_huggingface(self) -> HuggingFaceGenerator:
        """This model behind HuggingFace's interface, for tools that want `output.logits`.

        A `PreTrainedModel` on this model's own weights and quantizers, for `generate` and for
        evaluation harnesses; nothing is copied.
        """
        model = HuggingFaceGenerator(self)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model


ARCHITECTURES: dict[str, type[PreparedDecoder]] = {}


def register(cls: type[PreparedDecoder]) -> type[PreparedDecoder]:
    """Make an architecture known to `prepare` under the HuggingFace class it stands for.

    And to AIMET's AdaScale, which finds a model's blocks by their class and, of a class that it
    does not know, changes nothing without a word.
    """
    ARCHITECTURES[cls.hf_class] = cls
    adascale_model_config_dict[cls] = AdaScaleModelConfig(block_type=cls.block_class)
    return cls
