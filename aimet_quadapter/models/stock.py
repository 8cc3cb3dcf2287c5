"""A HuggingFace model as it is, in the form that AIMET can simulate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .wrappers import refuse_wrapped


class LogitsOnly(nn.Module):
    """Token ids (B, T) → logits (B, T, V), by the HuggingFace model itself, without a cache.

    AIMET traces a model and takes tensors only; HuggingFace returns an object with a cache in it.

    Args:
        model: a HuggingFace causal language model; held, not copied, and put in eval mode.

    Raises:
        UnsupportedModelError: not a HuggingFace model, or one inside another's class.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        refuse_wrapped(model)
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no HuggingFace model: pass "
                "AutoModelForCausalLM.from_pretrained(...), or the model itself to AIMET."
            )
        self.model = model.eval()
        self.config: Any = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(
            input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        return logits
