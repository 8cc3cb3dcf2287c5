"""Qwen3 (`Qwen3ForCausalLM`): Llama with norms of queries and keys, and its mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..description import MLP, Decoder, Layer, family
from .llama import PARTS, attention, decoder

NORMED = PARTS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
EXPERTS = {"router": "mlp.gate", "experts": "mlp.experts"}


@family("Qwen3ForCausalLM")
def qwen3(config: Any) -> Decoder:
    """Norms of each head."""
    return decoder(config, Layer(attention(config), MLP(config.hidden_act), NORMED))


@family("Qwen3MoeForCausalLM")
def qwen3_moe(config: Any) -> Decoder:
    """Every `decoder_sparse_step`-th layer has experts."""
    plain = qwen3(config)
    experts = MLP(
        config.hidden_act, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
    )
    parts = {k: v for k, v in NORMED.items() if k not in {"gate", "up", "down"}} | EXPERTS

    def sparse(i: int) -> bool:
        step = (i + 1) % config.decoder_sparse_step == 0
        return i not in config.mlp_only_layers and config.num_experts > 0 and step

    layers = tuple(
        replace(layer, mlp=experts, parts=parts) if sparse(i) else layer
        for i, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=layers)
