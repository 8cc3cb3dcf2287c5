"""OPT (`OPTForCausalLM`): learned positions behind two unused rows, ReLU."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Attention, Decoder, Layer, family

PARTS = {
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "mlp": "mlp",
    "up": "fc1",
    "down": "fc2",
}
BEFORE = {"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
BEHIND = {"attn_norm_sum": "self_attn_layer_norm", "mlp_norm_sum": "final_layer_norm"}
MODEL = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "blocks": "model.decoder.layers",
    "head": "lm_head",
}
PROJECTED = {"project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out"}


@family("OPTForCausalLM")
def opt(config: Any) -> Decoder:
    """OPT-350m norms the sums, and projects from and to a narrower embedding."""
    before = config.do_layer_norm_before
    size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    layer = Layer(
        Attention(heads, heads, size, size**-0.5),
        MLP(config.activation_function),
        PARTS | (BEFORE if before else BEHIND),
    )
    model = dict(MODEL)
    if before and not config._remove_final_layer_norm:
        model["final_norm"] = "model.decoder.final_layer_norm"
    if config.word_embed_proj_dim != config.hidden_size:
        model |= PROJECTED
    return Decoder(
        (layer,) * config.num_hidden_layers,
        model,
        config.max_position_embeddings,
        position_offset=2,
        positions_from_mask=True,
    )
