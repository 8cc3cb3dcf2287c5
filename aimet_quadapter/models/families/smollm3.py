"""SmolLM3 (`SmolLM3ForCausalLM`): Llama without positions in some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..description import Decoder, family
from .llama import llama


@family("SmolLM3ForCausalLM")
def smollm3(config: Any) -> Decoder:
    """`no_rope_layers` is 1 where a layer has rotary positions."""
    plain = llama(config)
    layers = []
    for layer, rotary in zip(plain.layers, config.no_rope_layers, strict=True):
        attention = layer.attention
        if not rotary:
            attention = replace(attention, rotary=None, rotary_size=0)
        if not config.use_sliding_window:
            attention = replace(attention, window=None)
        layers.append(replace(layer, attention=attention))
    return replace(plain, layers=tuple(layers))
