"""Mixtral (`MixtralForCausalLM`): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder

EXPERTS = without(PARTS, "gate", "up", "down", router="mlp.gate", experts="mlp.experts")


@family("MixtralForCausalLM")
def mixtral(config: Any) -> Decoder:
    """The chosen experts' scores always sum to 1."""
    mlp = MLP(config.hidden_act, config.num_local_experts, config.num_experts_per_tok)
    return decoder(config, Layer(attention(config), mlp, EXPERTS))
