"""Phi 1, 1.5, 2 (`PhiForCausalLM`) and Phi 3 to 4 (`Phi3ForCausalLM`)."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import MODEL, PARTS, attention, decoder, head_size

PHI = without(
    PARTS,
    "gate",
    "mlp_norm",
    o="self_attn.dense",
    up="mlp.fc1",
    down="mlp.fc2",
)
PHI3 = without(
    PARTS, "q", "k", "v", "gate", "up", qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"
)


def rotated(config: Any) -> int:
    """Channels of a head that are rotated."""
    return int(head_size(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


@family("PhiForCausalLM")
def phi(config: Any) -> Decoder:
    """Attention and MLP side by side behind one norm; rotary on a part of each head."""
    norms = {"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"}
    parts = PHI | (norms if config.qk_layernorm else {})
    partial = attention(config, rotary_size=rotated(config))
    layer = Layer(partial, MLP(config.hidden_act), parts, parallel=True)
    return decoder(config, layer, parts=MODEL | {"final_norm": "model.final_layernorm"})


@family("Phi3ForCausalLM")
def phi3(config: Any) -> Decoder:
    """Llama with fused projections."""
    partial = attention(config, rotary_size=rotated(config))
    return decoder(config, Layer(partial, MLP(config.hidden_act), PHI3))
