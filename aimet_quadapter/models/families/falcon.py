"""Falcon 7B, 40B, 180B and their kin (`FalconForCausalLM`)."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family, without
from .gpt_neox import PARTS as NEOX

PARTS = without(
    NEOX,
    "mlp_norm",
    attention="self_attention",
    qkv="self_attention.query_key_value",
    o="self_attention.dense",
)
MODEL = {
    "embed": "transformer.word_embeddings",
    "rotary": "transformer.rotary_emb",
    "blocks": "transformer.h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


@family("FalconForCausalLM")
def falcon(config: Any) -> Decoder:
    """One key head for all queries, a group of them (new architecture), or one each."""
    size = config.hidden_size // config.num_attention_heads
    new = config.new_decoder_architecture
    shared = config.multi_query and not new
    heads = config.num_attention_heads
    attention = Attention(
        heads,
        config.num_kv_heads if new else 1 if shared else heads,
        size,
        size**-0.5,
        rotary="",
        rotary_size=size,
        grouped=not shared,
    )
    parts = dict(PARTS)
    if new and config.num_ln_in_parallel_attn != 1:
        parts |= {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    elif not config.parallel_attn:
        parts["mlp_norm"] = "post_attention_layernorm"
    layer = Layer(attention, MLP(config.activation), parts, parallel=config.parallel_attn or new)
    alibi = ("ALiBi positions that are rounded to bfloat16 (config.alibi)",)
    return Decoder(
        (layer,) * config.num_hidden_layers,
        MODEL,
        config.max_position_embeddings,
        missing=alibi if config.alibi else (),
    )
