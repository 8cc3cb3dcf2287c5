"""A tiny random model of every architecture that `prepare` knows, and variants of their configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from tiny import VOCAB, gpt2, llama, shaken

TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NARROW = {k: v for k, v in LLAMA.items() if k not in {"intermediate_size", "num_key_value_heads"}}
OPT = NARROW | {"ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON = NARROW
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
    "max_position_embeddings": 64,
}
GEMMA = LLAMA | {"head_dim": 8}
CAPPED = {
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
HALF = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    }
}
FACTORS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
    "logits_scaling": 8.0,
}


def build(name: str, defaults: dict[str, Any], **changes: Any) -> Any:
    """A random model of a HuggingFace class, its config's class found by the model's name."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return shaken(cls(cls.config_class(**TOKENS | defaults | changes)))


FAMILIES: dict[str, Callable[..., Any]] = {
    "bloom": partial(build, "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "cohere": partial(build, "CohereForCausalLM", LLAMA),
    "falcon": partial(build, "FalconForCausalLM", FALCON),
    "gemma": partial(build, "GemmaForCausalLM", GEMMA),
    "gemma2": partial(build, "Gemma2ForCausalLM", GEMMA | SLIDING | CAPPED),
    "gemma3": partial(build, "Gemma3ForCausalLM", GEMMA | SLIDING | {"query_pre_attn_scalar": 16}),
    "gpt2": gpt2,
    "gpt_bigcode": partial(build, "GPTBigCodeForCausalLM", GPT | {"n_positions": 64}),
    "gpt_neo": partial(build, "GPTNeoForCausalLM", NEO),
    "gpt_neox": partial(build, "GPTNeoXForCausalLM", NARROW | {"intermediate_size": 48} | HALF),
    "gptj": partial(build, "GPTJForCausalLM", GPT | {"rotary_dim": 4, "n_positions": 64}),
    "granite": partial(build, "GraniteForCausalLM", LLAMA | FACTORS),
    "llama": llama,
    "mistral": partial(build, "MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "mixtral": partial(
        build, "MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "sliding_window": None}
    ),
    "nemotron": partial(build, "NemotronForCausalLM", LLAMA),
    "olmo2": partial(build, "Olmo2ForCausalLM", LLAMA),
    "olmo3": partial(build, "Olmo3ForCausalLM", LLAMA | SLIDING),
    "opt": partial(build, "OPTForCausalLM", OPT),
    "phi": partial(build, "PhiForCausalLM", LLAMA),
    "phi3": partial(build, "Phi3ForCausalLM", LLAMA | {"sliding_window": None}),
    "qwen2": partial(build, "Qwen2ForCausalLM", LLAMA),
    "qwen3": partial(build, "Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "qwen3_moe": partial(
        build,
        "Qwen3MoeForCausalLM",
        LLAMA
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16},
    ),
    "smollm3": partial(build, "SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [1, 0]}),
    "stablelm": partial(build, "StableLmForCausalLM", LLAMA),
    "starcoder2": partial(build, "Starcoder2ForCausalLM", LLAMA | {"sliding_window": 5}),
}
"""Name of the family → what builds a model of it; keyword arguments change its config."""


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-odd-heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "cohere-biases": ("cohere", {"attention_bias": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-one-key-each": ("falcon", {"multi_query": False}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "gemma3-short": ("gemma3", {"sliding_window": 30}),
    "gemma3-uncapped": ("gemma3", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu", "n_inner": 40}),
    "gpt2-inverse-layer-scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-one-head": ("gpt2", {"n_head": 1}),
    "gpt_bigcode-one-key-each": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode-unscaled": ("gpt_bigcode", {"scale_attn_weights": False}),
    "gpt_bigcode-untied": ("gpt_bigcode", {"tie_word_embeddings": False}),
    "gpt_bigcode-relu": ("gpt_bigcode", {"activation_function": "relu", "n_inner": 40}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-biases": ("gpt_neox", {"attention_bias": False}),
    "gptj-whole-heads": ("gptj", {"rotary_dim": 8}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama-rope-llama3": ("llama", _rope("llama3", **LLAMA3, **ORIGINAL)),
    "llama-rope-linear": ("llama", _rope("linear", factor=2.0)),
    "llama-rope-yarn": ("llama", _rope("yarn", factor=4.0, **ORIGINAL)),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "nemotron-whole-heads": ("nemotron", _rope("default", partial_rotary_factor=1.0)),
    "nemotron-rope-linear": (
        "nemotron",
        _rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "nemotron-head-dim": ("nemotron", {"head_dim": 16, "num_key_value_heads": 1}),
    "nemotron-gelu": ("nemotron", {"hidden_act": "gelu"}),
    "nemotron-tied": ("nemotron", {"tie_word_embeddings": True}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "phi-qk-norms": ("phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    "phi3-partial": (
        "phi3",
        {"partial_rotary_factor": 0.5, **_rope("default", partial_rotary_factor=0.5)},
    ),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, **SLIDING, "max_window_layers": 1}),
    "qwen3-moe-mixed": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2-no-biases": ("starcoder2", {"use_bias": False}),
}
"""A switch of a family's config each."""


def model(name: str) -> Any:
    """A model of a family, or of a variant of one."""
    family, changes = VARIANTS.get(name, (name, {}))
    return FAMILIES[family](**changes)
