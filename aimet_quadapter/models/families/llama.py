"""Llama 1 to 3.3 (`LlamaForCausalLM`), and what its kin share with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family

PARTS = {
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp": "mlp",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
MODEL = {
    "embed": "model.embed_tokens",
    "rotary": "model.rotary_emb",
    "blocks": "model.layers",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def head_size(config: Any) -> int:
    """Size of a head: the config's, or the hidden size divided by the heads."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, None where it sees all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def attention(config: Any, **changes: Any) -> Attention:
    """Grouped queries with rotary positions, and what is different here."""
    size = head_size(config)
    facts = {
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_size": size,
        "scale": size**-0.5,
        "rotary": "",
        "rotary_size": size,
    }
    return Attention(**facts | changes)


def decoder(config: Any, layer: Layer, **changes: Any) -> Decoder:
    """A stack of equal layers, each with its own window, and what is different here."""
    count = config.num_hidden_layers
    layers = tuple(
        replace(layer, attention=replace(layer.attention, window=window(config, i)))
        for i in range(count)
    )
    facts = {"layers": layers, "parts": MODEL, "positions": config.max_position_embeddings}
    return Decoder(**facts | changes)


@family("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
def llama(config: Any) -> Decoder:
    """Biases come with the weights; Mistral and Qwen2 have windows of their own."""
    return decoder(config, Layer(attention(config), MLP(config.hidden_act), PARTS))
