"""Llama and its kin (`LlamaForCausalLM`): RMSNorm, rotary positions, grouped queries, gate × up."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from aimet_torch.nn.modules.custom import Add, Multiply
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..activations import activation, missing_activation
from ..attention import Attention, Cache, constant, merge_heads, repeat_kv, split_heads
from ..copies import copy_module
from ..decoder import Body, PreparedDecoder, register
from ..norms import rms_norm

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose tables do not depend on the length of the text."""


class Rotary(nn.Module):
    """x · cos + half-rotated x · sin (Su et al., 2021).

    HuggingFace negates half of x; here the sign lies in the table of sines, which is equal and
    leaves two products and one sum to quantize, and only data movement between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mul_cos = Multiply()
        self.mul_sin = Multiply()
        self.add = Add()

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)  # (B, H, T, D)
        return self.add(self.mul_cos(x, cos), self.mul_sin(swapped, signed_sin))


class LlamaAttention(nn.Module):
    """q, k, v → rotary → grouped-query attention → o_proj."""

    def __init__(self, hf: Any, config: Any) -> None:
        super().__init__()
        self.layer = hf.layer_idx
        self.n_heads = config.num_attention_heads
        self.n_kv = config.num_key_value_heads
        self.q_proj = copy_module(hf.q_proj, nn.Linear)
        self.k_proj = copy_module(hf.k_proj, nn.Linear)
        self.v_proj = copy_module(hf.v_proj, nn.Linear)
        self.rotary_q = Rotary()
        self.rotary_k = Rotary()
        self.attention = Attention(self.n_heads, hf.scaling)
        self.o_proj = copy_module(hf.o_proj, nn.Linear)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None
    ) -> Tensor:
        q = self.rotary_q(split_heads(self.q_proj(x), self.n_heads), cos, sin)
        k = self.rotary_k(split_heads(self.k_proj(x), self.n_kv), cos, sin)
        v = split_heads(self.v_proj(x), self.n_kv)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        times = self.n_heads // self.n_kv
        y = self.attention(q, repeat_kv(k, times), repeat_kv(v, times), mask)
        return self.o_proj(merge_heads(y))


class LlamaMLP(nn.Module):
    """down(activation(gate(x)) × up(x))."""

    module_inputs = ("mul",)
    """Operations that AIMET quantizes on HuggingFace's model too, at the next module's input."""

    def __init__(self, hf: Any, config: Any) -> None:
        super().__init__()
        self.gate_proj = copy_module(hf.gate_proj, nn.Linear)
        self.up_proj = copy_module(hf.up_proj, nn.Linear)
        self.act = activation(config.hidden_act)
        self.mul = Multiply()
        self.down_proj = copy_module(hf.down_proj, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.mul(self.act(self.gate_proj(x)), self.up_proj(x)))


class LlamaBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, hf: Any, config: Any, norm_class: type[nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = rms_norm(hf.input_layernorm, norm_class, config.rms_norm_eps)
        self.self_attn = LlamaAttention(hf.self_attn, config)
        self.add_attn = Add()
        norm = hf.post_attention_layernorm
        self.post_attention_layernorm = rms_norm(norm, norm_class, config.rms_norm_eps)
        self.mlp = LlamaMLP(hf.mlp, config)
        self.add_mlp = Add()

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None
    ) -> Tensor:
        x = self.add_attn(x, self.self_attn(self.input_layernorm(x), mask, cos, sin, cache))
        return self.add_mlp(x, self.mlp(self.post_attention_layernorm(x)))


class LlamaModel(Body):
    """Token embedding, blocks and the final norm; the rotary tables as buffers."""

    blocks = "layers"
    final_norm = "norm"
    cos: Tensor
    signed_sin: Tensor

    def __init__(self, hf: Any, config: Any, norm_class: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = copy_module(hf.embed_tokens, nn.Embedding)
        self.layers = nn.ModuleList(LlamaBlock(b, config, norm_class) for b in hf.layers)
        self.norm = rms_norm(hf.norm, norm_class, config.rms_norm_eps)
        positions = torch.arange(config.max_position_embeddings, device=hf.norm.weight.device)
        cos, sin = hf.rotary_emb(hf.norm.weight.detach().float(), positions[None])  # (1, N, D)
        sign = torch.ones_like(sin)
        sign[..., : sin.shape[-1] // 2] = -1
        self.register_buffer("cos", cos[0].clone(), persistent=False)
        self.register_buffer("signed_sin", (sin * sign)[0].clone(), persistent=False)

    def embed(self, ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if position_ids is None:
            cos, sin = self.cos[: ids.shape[1]], self.signed_sin[: ids.shape[1]]  # (T, D)
        else:
            cos, sin = (_look_up(t, position_ids) for t in (self.cos, self.signed_sin))
        x = self.embed_tokens(ids)  # (B, T, C)
        return x, {"cos": constant(cos, x), "sin": constant(sin, x)}


def _look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table (N, D) at positions (B, T): (B, 1, T, D).

    `table[positions]` would become ONNX GatherND, which Qualcomm's HTP library does not take;
    this is Gather.
    """
    rows = table.index_select(0, positions.flatten())
    return rows.view(positions.shape[0], 1, positions.shape[1], table.shape[1])


@register
class PreparedLlama(PreparedDecoder):
    """`LlamaForCausalLM` of any size; `lm_head` holds its own copy of a tied embedding."""

    hf_class = "LlamaForCausalLM"
    default_kinds = ("norm-linear", "norm-head", "up-down", "v-o", "linear-linear")
    residual_writers = ("*.self_attn.o_proj", "*.mlp.down_proj")
    residual_sums = ("*.add_attn", "*.add_mlp")
    body = "model"
    block_class = LlamaBlock
    norm_class: ClassVar[type[nn.Module]] = LlamaRMSNorm
    """HuggingFace's norm, for kin of Llama that name it otherwise; the same formula."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.model = LlamaModel(hf.model, hf.config, self.norm_class)
        self.lm_head = copy_module(hf.lm_head, nn.Linear)

    @classmethod
    def missing(cls, config: Any) -> list[str]:
        lines = missing_activation(config.hidden_act)
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope not in STATIC_ROPE:
            lines.append(f"rotary type {rope!r} (known: {', '.join(STATIC_ROPE)})")
        return lines
