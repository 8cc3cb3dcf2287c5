"""GPT-2 and DistilGPT-2 (`GPT2LMHeadModel`)."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family

PARTS = {
    "attention": "attn",
    "qkv": "attn.c_attn",
    "o": "attn.c_proj",
    "mlp": "mlp",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
}
MODEL = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks": "transformer.h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


@family("GPT2LMHeadModel")
def gpt2(config: Any) -> Decoder:
    """The pairs that are used are the paper's."""
    size = config.n_embd // config.n_head
    layers = []
    for i in range(config.n_layer):
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= i + 1
        attention = Attention(config.n_head, config.n_head, size, scale)
        layers.append(Layer(attention, MLP(config.activation_function), PARTS))
    crossed = ("cross-attention (config.add_cross_attention)",)
    return Decoder(
        tuple(layers),
        MODEL,
        config.n_positions,
        kinds=("norm-linear", "norm-head"),
        missing=crossed if config.add_cross_attention else (),
    )
