"""Command R (`CohereForCausalLM`): branches side by side behind one norm, interleaved rotary."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder

ONE_NORM = without(PARTS, "mlp_norm")


@family("CohereForCausalLM")
def cohere(config: Any) -> Decoder:
    """The logits have a factor."""
    by_head = ("a norm for each head of queries and keys (config.use_qk_norm)",)
    layer = Layer(
        attention(config, interleaved=True), MLP(config.hidden_act), ONE_NORM, parallel=True
    )
    return decoder(
        config,
        layer,
        logit_scale=config.logit_scale,
        missing=by_head if config.use_qk_norm else (),
    )
