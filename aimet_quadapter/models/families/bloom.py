"""BLOOM (`BloomForCausalLM`): ALiBi positions, a norm of the embedding."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family, without
from .falcon import MODEL as FALCON
from .falcon import PARTS as FALCON_PARTS

PARTS = FALCON_PARTS | {"mlp_norm": "post_attention_layernorm"}
MODEL = without(FALCON, "rotary", embed_norm="transformer.word_embeddings_layernorm")


@family("BloomForCausalLM")
def bloom(config: Any) -> Decoder:
    """The projections are fused head by head."""
    heads, size = config.n_head, config.hidden_size // config.n_head
    attention = Attention(heads, heads, size, size**-0.5, alibi=True, grouped=True)
    missing = []
    if config.apply_residual_connection_post_layernorm:
        missing.append("a stream of normed values (apply_residual_connection_post_layernorm)")
    return Decoder(
        (Layer(attention, MLP("gelu_new"), PARTS),) * config.n_layer,
        MODEL,
        None,
        missing=tuple(missing),
    )
