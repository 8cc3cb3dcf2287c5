"""StableLM (`StableLmForCausalLM`): LayerNorm, rotary on a part of each head."""

from __future__ import annotations

from typing import Any

from ..description import MLP, Decoder, Layer, family, without
from .llama import PARTS, attention, decoder
from .phi import rotated


@family("StableLmForCausalLM")
def stablelm(config: Any) -> Decoder:
    """StableLM 2 1.6B is sequential, 12B has branches side by side behind one norm."""
    parallel = config.use_parallel_residual
    parts = without(PARTS, "mlp_norm") if parallel else PARTS
    partial = attention(config, rotary_size=rotated(config))
    by_head = ("a norm for each head of queries and keys (config.qk_layernorm)",)
    return decoder(
        config,
        Layer(partial, MLP(config.hidden_act), parts, parallel=parallel),
        missing=by_head if config.qk_layernorm else (),
    )
