"""Attention as modules, the mask that is added to its scores, and how heads are laid out."""

from __future__ import annotations

from typing import Protocol

import torch
from aimet_torch.nn.modules.custom import Add, MatMul, Multiply
from torch import Tensor, nn

MASK_VALUE = -50.0
"""Added to the score of a position that must not be seen, unless the model's scores need more.

`exp(-50)` is 2e-22: masked positions vanish where their scores lie less than about 30 above those
that are seen; `prepare` measures that. HuggingFace adds the smallest float instead, which leaves no
step of an 8-bit range for the scores themselves.
"""


class Cache(Protocol):
    """Keys and values of earlier tokens, as HuggingFace's `Cache`, one call a layer.

    Attributes:
        begun: it holds the model's prefix, if there is one, and may hold more.
    """

    begun: bool

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values (B, K, T, D); all to attend to, (B, K, S, D)."""
        ...


class Recorded:
    """A cache that holds nothing and notes what it is given.

    Attributes:
        tensors: keys and values of layer 0, of layer 1, …
    """

    begun = False

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Note them; they are all there is to attend to."""
        self.tensors += [key, value]
        return key, value


class Attention(nn.Module):
    """softmax(scale · QKᵀ + mask) · V, each operation a module of its own.

    With a soft-cap c the scores are c · tanh(scale / c · QKᵀ).

    Args:
        n_heads: query heads H.
        scale: factor of the scores, usually 1/√(head size).
        softcap: c, or None.
    """

    scale: Tensor
    cap: Tensor

    def __init__(self, n_heads: int, scale: float, softcap: float | None = None) -> None:
        super().__init__()
        self.softcap = softcap
        self.register_buffer("scale", factor(n_heads, scale / (softcap or 1)), persistent=False)
        self.qk = MatMul()
        self.scale_scores = Multiply()
        if softcap is not None:
            self.register_buffer("cap", factor(n_heads, softcap), persistent=False)
            self.tanh = nn.Tanh()
            self.scale_tanh = Multiply()
        self.add_mask = Add()
        self.softmax = nn.Softmax(dim=-1)
        self.av = MatMul()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scale = constant(self.scale, q)
        scores = self.scale_scores(self.qk(q, k.transpose(-1, -2)), scale)  # (B, H, T, S)
        if self.softcap is not None:
            scores = self.scale_tanh(self.tanh(scores), constant(self.cap, q))
        probs = self.softmax(self.add_mask(scores, mask))
        return self.av(probs, v)  # (B, H, T, D)


def factor(n: int, value: float) -> Tensor:
    """A factor of the (n, ·, ·) dimensions in front of it, (n, 1, 1) in fp32.

    One equal number each: AIMET leaves a product with a scalar constant unquantized, and a device
    operation without an encoding falls back to the CPU.
    """
    return torch.full((max(n, 2), 1, 1), value, dtype=torch.float32)[:n]


def constant(table: Tensor, like: Tensor) -> Tensor:
    """A table in the dtype of what it meets: it is kept in fp32, whatever the model's weights are.

    Rounded to bf16 once, it would be another model's in every other precision.
    """
    return table if table.dtype == like.dtype else table.to(like.dtype)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, H·D) → (B, H, T, D)."""
    return x.reshape(x.shape[0], x.shape[1], n_heads, x.shape[2] // n_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H·D)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """(B, K, T, D) → (B, K·times, T, D): each key/value head serves `times` query heads."""
    if times == 1:
        return x
    b, k, t, d = x.shape
    return x[:, :, None].expand(b, k, times, t, d).reshape(b, k * times, t, d)


def additive_mask(
    attention_mask: Tensor | None,
    like: Tensor,
    value: float,
    window: int | None = None,
    prefix: int = 0,
) -> Tensor:
    """The mask that is added to the scores, (B or 1, 1, T, P + T): 0, or `value` where hidden.

    It is made of the model's inputs alone. For a device pass it as an input of its own (4-D,
    returned as it is where there is no window) or leave it out: the causal mask of a fixed length
    is a constant.

    Args:
        attention_mask: see `PreparedDecoder.forward`.
        like: hidden states (B, T, C), for length, dtype and device.
        value: the model's `mask_value`.
        window: how many tokens a token sees, itself among them; a 4-D mask of another length than
            the text is taken to know it.
        prefix: tokens P before the text, seen by all of it but for a window.
    """
    length = like.shape[1]
    position = torch.arange(prefix + length, device=like.device)
    row = position[prefix:, None]
    hidden = position > row  # (T, P + T)
    if window is not None:
        hidden = hidden | (row - position >= window)
    if attention_mask is not None and attention_mask.dim() == 4:
        if not attention_mask.is_floating_point():
            attention_mask = (attention_mask == 0).to(like.dtype) * value
        matters = window is not None or prefix > 0  # comparing shapes is traced
        of_text = matters and attention_mask.shape[-1] == attention_mask.shape[-2]
        if prefix and of_text:
            attention_mask = nn.functional.pad(attention_mask, (prefix, 0))
        if window is None or not of_text:
            return attention_mask.to(like.dtype)
        return attention_mask.to(like.dtype).masked_fill(hidden, value)
    if attention_mask is not None:
        seen = nn.functional.pad(attention_mask, (prefix, 0), value=1)
        hidden = hidden | (seen[:, None, None, :] == 0)
    else:
        hidden = hidden[None, None]
    return hidden.to(like.dtype) * value


def alibi_slopes(heads: int) -> Tensor:
    """Slope of each head, (H, 1, 1) in fp32 (Press et al., 2022): 2^(−8h/H), h = 1 … H.

    For H that is no power of two, those of the next smaller one and every second of the next
    larger one's.
    """
    whole = 2 ** (heads.bit_length() - 1)
    first = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    more = [2 ** (-8 * h / (2 * whole)) for h in range(1, 2 * (heads - whole) + 1, 2)]
    return torch.tensor(first + more, dtype=torch.float32)[:, None, None]
