"""Gemma, Gemma 2 and Gemma 3 for text: norms of 1 + weight, a scaled embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..description import MLP, Decoder, Layer, family
from .llama import PARTS, attention, decoder

AROUND = PARTS | {
    "attn_norm_after": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_norm_after": "post_feedforward_layernorm",
}
NORMED = AROUND | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@family("GemmaForCausalLM")
def gemma(config: Any) -> Decoder:
    """The embedding's scale and the norms' 1 are found in the modules."""
    return decoder(config, Layer(attention(config), MLP(config.hidden_act), PARTS))


@family("Gemma2ForCausalLM")
def gemma2(config: Any) -> Decoder:
    """Norms before and after each branch; scores and logits are capped."""
    capped = attention(
        config,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
    )
    layer = Layer(capped, MLP(config.hidden_activation), AROUND)
    return decoder(config, layer, logit_softcap=config.final_logit_softcapping)


@family("Gemma3ForCausalLM")
def gemma3(config: Any) -> Decoder:
    """Norms of queries and keys instead of a cap; rotary tables by kind of layer."""
    two = gemma2(config)
    layers = tuple(
        replace(layer, parts=NORMED, attention=replace(layer.attention, rotary=kind, softcap=None))
        for layer, kind in zip(two.layers, config.layer_types, strict=True)
    )
    both = "attention in both directions (config.use_bidirectional_attention)"
    return replace(
        two, layers=layers, missing=(both,) if config.use_bidirectional_attention else ()
    )
