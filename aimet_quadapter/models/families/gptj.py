"""GPT-J (`GPTJForCausalLM`): branches side by side behind one norm, interleaved rotary."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family

PARTS = {
    "attention": "attn",
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "o": "attn.out_proj",
    "mlp": "mlp",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
    "attn_norm": "ln_1",
}
MODEL = {
    "embed": "transformer.wte",
    "rotary": "transformer.rotary_emb",
    "blocks": "transformer.h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


@family("GPTJForCausalLM")
def gptj(config: Any) -> Decoder:
    """Rotary on the first channels of each head."""
    heads, size = config.n_head, config.n_embd // config.n_head
    attention = Attention(
        heads,
        heads,
        size,
        size**-0.5,
        rotary="",
        rotary_size=config.rotary_dim or size,
        interleaved=True,
    )
    layer = Layer(attention, MLP(config.activation_function), PARTS, parallel=True)
    return Decoder((layer,) * config.n_layer, MODEL, config.n_positions)
