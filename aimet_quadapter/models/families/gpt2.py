"""GPT-2 and DistilGPT-2 (`GPT2LMHeadModel`)."""

from __future__ import annotations

from typing import Any

import torch
from aimet_torch.nn.modules.custom import Add
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..activations import activation, missing_activation
from ..attention import Attention, Cache, merge_heads, split_heads
from ..copies import check_module, copy_module
from ..decoder import Body, PreparedDecoder, register


def _linear(conv1d: Any) -> nn.Linear:
    """HuggingFace's Conv1D (weight (in, out)) → the equal Linear (weight (out, in))."""
    check_module(conv1d, Conv1D)
    d_in, d_out = conv1d.weight.shape
    linear = nn.Linear(d_in, d_out, device="meta")
    linear.weight = nn.Parameter(conv1d.weight.detach().t().contiguous().clone())
    linear.bias = nn.Parameter(conv1d.bias.detach().clone())
    return linear


class GPT2Attention(nn.Module):
    """c_attn → split → heads → attention → c_proj."""

    def __init__(self, hf: Any, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_head
        scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        self.c_attn = _linear(hf.c_attn)
        self.attention = Attention(self.n_heads, scale)
        self.c_proj = _linear(hf.c_proj)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # 3 × (B, T, C)
        q, k, v = (split_heads(t, self.n_heads) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.c_proj(merge_heads(self.attention(q, k, v, mask)))


class GPT2MLP(nn.Module):
    """c_fc → activation → c_proj."""

    def __init__(self, hf: Any, config: Any) -> None:
        super().__init__()
        self.c_fc = _linear(hf.c_fc)
        self.act = activation(config.activation_function)
        self.c_proj = _linear(hf.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class GPT2Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, hf: Any, config: Any, layer: int) -> None:
        super().__init__()
        self.ln_1 = copy_module(hf.ln_1, nn.LayerNorm)
        self.attn = GPT2Attention(hf.attn, config, layer)
        self.add_attn = Add()
        self.ln_2 = copy_module(hf.ln_2, nn.LayerNorm)
        self.mlp = GPT2MLP(hf.mlp, config)
        self.add_mlp = Add()

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.add_attn(x, self.attn(self.ln_1(x), mask, cache))
        return self.add_mlp(x, self.mlp(self.ln_2(x)))


class GPT2Transformer(Body):
    """Token and position embeddings, blocks and the final norm."""

    blocks = "h"
    final_norm = "ln_f"

    def __init__(self, hf: Any, config: Any) -> None:
        super().__init__()
        self.wte = copy_module(hf.wte, nn.Embedding)
        self.wpe = copy_module(hf.wpe, nn.Embedding)
        self.add_embeddings = Add()
        self.h = nn.ModuleList(GPT2Block(b, config, i) for i, b in enumerate(hf.h))
        self.ln_f = copy_module(hf.ln_f, nn.LayerNorm)

    def embed(self, ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.add_embeddings(self.wte(ids), self.wpe(position_ids)), {}  # (B, T, C)


@register
class PreparedGPT2(PreparedDecoder):
    """`GPT2LMHeadModel` of any size; `lm_head` holds its own copy of the token embedding."""

    hf_class = "GPT2LMHeadModel"
    default_kinds = ("norm-linear", "norm-head")
    residual_writers = ("*.attn.c_proj", "*.mlp.c_proj")
    residual_sums = ("*.add_embeddings", "*.add_attn", "*.add_mlp")
    body = "transformer"
    block_class = GPT2Block

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.transformer = GPT2Transformer(hf.transformer, hf.config)
        self.lm_head = copy_module(hf.lm_head, nn.Linear)

    @classmethod
    def missing(cls, config: Any) -> list[str]:
        lines = missing_activation(config.activation_function)
        if config.add_cross_attention:
            lines.append("cross-attention (config.add_cross_attention)")
        return lines
