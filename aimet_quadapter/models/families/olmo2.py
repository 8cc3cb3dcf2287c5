"""OLMo 2 and 3: norms behind each branch only, and of all queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder

BEHIND = without(
    PARTS,
    "attn_norm",
    "mlp_norm",
    attn_norm_after="post_attention_layernorm",
    mlp_norm_after="post_feedforward_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)


@family("Olmo2ForCausalLM")
def olmo2(config: Any) -> Decoder:
    """The stream itself is what the projections read."""
    return decoder(config, Layer(attention(config), MLP(config.hidden_act), BEHIND))


@family("Olmo3ForCausalLM")
def olmo3(config: Any) -> Decoder:
    """Sliding windows, and rotary tables by kind of layer."""
    two = olmo2(config)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rotary=kind))
        for layer, kind in zip(two.layers, config.layer_types, strict=True)
    )
    return replace(two, layers=layers)
