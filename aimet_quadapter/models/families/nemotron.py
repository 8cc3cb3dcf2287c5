"""Nemotron-3 8B, Nemotron-4, Minitron (`NemotronForCausalLM`): LayerNorms of 1 + weight."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder
from .phi import rotated

PLAIN = without(PARTS, "gate")


@family("NemotronForCausalLM")
def nemotron(config: Any) -> Decoder:
    """Rotary positions on a part of each head."""
    partial = attention(config, rotary_size=rotated(config))
    return decoder(config, Layer(partial, MLP(config.hidden_act), PLAIN))
