"""HuggingFace's `generate` for a model that is not HuggingFace's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HuggingFaceGenerator(PreTrainedModel, GenerationMixin):
    """HuggingFace's text generation over a prepared decoder, without a cache.

    Args:
        decoder: takes token ids, attention mask and positions; gives logits; has a `config`.
    """

    main_input_name = "input_ids"

    def __init__(self, decoder: Any) -> None:
        config = copy.deepcopy(decoder.config)
        # It has no attention and no experts of its own to choose for.
        config._attn_implementation = config._experts_implementation = "eager"
        super().__init__(config)
        self._decoder = [decoder]  # in a list: not a submodule, nothing is copied or moved

    @property
    def device(self) -> torch.device:
        return next(self._decoder[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._decoder[0].parameters()).dtype

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *_: Any, attention_mask: Tensor | None = None, **__: Any
    ) -> dict[str, Tensor | None]:
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids + len(self._decoder[0].prefix)
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
