"""GPT-Neo (`GPTNeoForCausalLM`): GPT-2 with separate projections, unscaled, and windows."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family
from .gpt2 import MODEL

PARTS = {
    "attention": "attn.attention",
    "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj",
    "v": "attn.attention.v_proj",
    "o": "attn.attention.out_proj",
    "mlp": "mlp",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
}


@family("GPTNeoForCausalLM")
def gpt_neo(config: Any) -> Decoder:
    """Local layers see `window_size` tokens."""
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    layers = tuple(
        Layer(
            Attention(
                heads, heads, size, 1.0, window=config.window_size if kind == "local" else None
            ),
            MLP(config.activation_function),
            PARTS,
        )
        for kind in config.attention_layers
    )
    return Decoder(layers, MODEL, config.max_position_embeddings)
