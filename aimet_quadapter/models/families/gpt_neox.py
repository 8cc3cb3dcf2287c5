"""GPT-NeoX, Pythia (`GPTNeoXForCausalLM`): projections fused by head, parallel branches."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family
from .llama import attention, decoder
from .phi import rotated

PARTS = {
    "attention": "attention",
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "mlp": "mlp",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
MODEL = {
    "embed": "gpt_neox.embed_in",
    "rotary": "gpt_neox.rotary_emb",
    "blocks": "gpt_neox.layers",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
}


@family("GPTNeoXForCausalLM")
def gpt_neox(config: Any) -> Decoder:
    """A norm for each of the branches."""
    fused = attention(config, rotary_size=rotated(config), grouped=True)
    layer = Layer(fused, MLP(config.hidden_act), PARTS, parallel=config.use_parallel_residual)
    return decoder(config, layer, parts=MODEL)
