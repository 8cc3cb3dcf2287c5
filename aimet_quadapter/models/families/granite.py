"""Granite 3 (`GraniteForCausalLM`): Llama with a factor at each of four places."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family
from .llama import PARTS, attention, decoder


@family("GraniteForCausalLM")
def granite(config: Any) -> Decoder:
    """Every factor goes into the weights in front of it."""
    layer = Layer(
        attention(config, scale=config.attention_multiplier),
        MLP(config.hidden_act),
        PARTS,
        branch_scale=config.residual_multiplier,
    )
    return decoder(
        config,
        layer,
        embedding_scale=config.embedding_multiplier,
        logit_scale=1 / config.logits_scaling,
    )
