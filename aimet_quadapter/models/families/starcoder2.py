"""StarCoder 2 (`Starcoder2ForCausalLM`): LayerNorm, a plain MLP, sliding windows."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder

PLAIN = without(PARTS, "gate", up="mlp.c_fc", down="mlp.c_proj")


@family("Starcoder2ForCausalLM")
def starcoder2(config: Any) -> Decoder:
    """Biases come with the weights."""
    return decoder(config, Layer(attention(config), MLP(config.hidden_act), PLAIN))
