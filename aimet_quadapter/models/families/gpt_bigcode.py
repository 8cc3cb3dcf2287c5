"""StarCoder 1 and SantaCoder (`GPTBigCodeForCausalLM`): GPT-2 with one key head for all queries."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family
from .gpt2 import MODEL, PARTS


@family("GPTBigCodeForCausalLM")
def gpt_bigcode(config: Any) -> Decoder:
    """With a key head for each query head, the projections are fused head by head."""
    heads, size = config.n_head, config.n_embd // config.n_head
    attention = Attention(
        heads,
        1 if config.multi_query else heads,
        size,
        size**-0.5 if config.scale_attn_weights else 1.0,
        grouped=not config.multi_query,
    )
    crossed = ("cross-attention (config.add_cross_attention)",)
    return Decoder(
        (Layer(attention, MLP(config.activation_function), PARTS),) * config.n_layer,
        MODEL,
        config.n_positions,
        missing=crossed if config.add_cross_attention else (),
    )
