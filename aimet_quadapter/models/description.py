"""A decoder as data: what it computes and where HuggingFace keeps its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .activations import missing_activation

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose tables do not depend on the length of the text."""

ALL_KINDS = ("norm-linear", "norm-head", "up-down", "v-o", "linear-linear")

LAYER_PARTS = {
    "attention": "module that holds the attention's operations",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "qkv": "the three in one, instead of q, k and v",
    "o": "output projection",
    "q_norm": "norm of the queries, of each head or of all, as its size says",
    "k_norm": "norm of the keys",
    "mlp": "module that holds the MLP's operations",
    "gate": "projection in front of the activation, where the MLP is gated",
    "up": "projection that is multiplied with it; the only one where the MLP is not gated",
    "gate_up": "the two in one, gate first, instead of gate and up",
    "down": "projection back to the stream",
    "router": "scores of the experts",
    "experts": "module that holds the experts' weights, stacked: gate_up_proj and down_proj",
    "attn_norm": "norm before the attention",
    "attn_norm_after": "norm of what the attention gives, before it is added",
    "attn_norm_sum": "norm of the sum",
    "mlp_norm": "norm before the MLP",
    "mlp_norm_after": "norm of what the MLP gives, before it is added",
    "mlp_norm_sum": "norm of the sum",
}
"""Part of a layer → what it is. A part that a description does not name is not there."""

MODEL_PARTS = {
    "embed": "token embedding",
    "positions": "embedding of positions, added to it",
    "project_in": "projection from the embedding to the stream",
    "embed_norm": "norm of the embedding",
    "rotary": "module that computes rotary tables",
    "blocks": "list of the layers",
    "final_norm": "norm behind the last layer",
    "project_out": "projection from the stream to the head",
    "head": "logits",
}
"""Part of a model → what it is. A part that a description does not name is not there."""


@dataclass(frozen=True)
class Attention:
    """softmax(scale · QKᵀ + mask) · V.

    Attributes:
        heads: query heads H.
        kv_heads: key/value heads K; each serves H / K query heads.
        head_size: size of a head D.
        scale: factor of the scores.
        softcap: c of c · tanh(scores / c), in front of the mask.
        window: how many tokens a token sees, itself among them; None sees all before it.
        rotary: name of the rotary tables ("" where the model has one pair of them); None has no
            rotary positions.
        rotary_size: channels of a head that are rotated, the first ones.
        interleaved: a rotation mixes channels 2i and 2i + 1, not i and i + rotary_size / 2.
        alibi: scores get slope · (position of the key) (Press et al., 2022).
        grouped: the rows of `qkv` lie head by head of K (its queries, its key, its value), not all
            queries, then all keys, then all values.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rotary: str | None = None
    rotary_size: int = 0
    interleaved: bool = False
    alibi: bool = False
    grouped: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key heads.")
        if self.rotary is not None and not 0 < self.rotary_size <= self.head_size:
            raise ValueError(
                f"rotary_size is {self.rotary_size}: at most head_size ({self.head_size})."
            )
        if self.rotary_size % 2:
            raise ValueError(f"rotary_size is {self.rotary_size}: channels are rotated in pairs.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: a token sees itself at least.")


@dataclass(frozen=True)
class MLP:
    """down(activation(gate x) · up x), or down(activation(up x)); or a weighted sum of such.

    Attributes:
        activation: HuggingFace's name of the activation function.
        experts: E of a mixture of experts; 0 is a plain MLP.
        experts_per_token: how many of them count for a token: those with the largest scores.
        normalized: their softmax scores are divided by their sum.
    """

    activation: str
    experts: int = 0
    experts_per_token: int = 0
    normalized: bool = True

    def __post_init__(self) -> None:
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"{self.experts_per_token} of {self.experts} experts a token.")


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention: the attention.
        mlp: the MLP.
        parts: part (`LAYER_PARTS`) → its name in HuggingFace's layer.
        parallel: the MLP reads what the attention reads, not the sum behind it; without a
            `mlp_norm` the same normed tensor.
        branch_scale: factor of what each branch adds to the stream.
    """

    attention: Attention
    mlp: MLP
    parts: Mapping[str, str]
    parallel: bool = False
    branch_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_parts(self.parts, LAYER_PARTS)


@dataclass(frozen=True)
class Decoder:
    """A causal language model.

    Attributes:
        layers: its layers, in order.
        parts: part (`MODEL_PARTS`) → its name in HuggingFace's model.
        positions: how many positions its tables hold; None where any text is taken.
        position_offset: rows of the position embedding that come before position 0.
        positions_from_mask: positions count the tokens that are not padding.
        embedding_scale: factor of the token embedding.
        logit_scale: factor of the logits.
        logit_softcap: c of c · tanh(logits / c).
        kinds: kinds of pairs that `apply_quadapter` uses unless told otherwise.
        missing: features of this configuration that the description does not cover, in words.
    """

    layers: tuple[Layer, ...]
    parts: Mapping[str, str]
    positions: int | None
    position_offset: int = 0
    positions_from_mask: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    kinds: tuple[str, ...] = ALL_KINDS
    missing: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_parts(self.parts, MODEL_PARTS)

    def unsupported(self, config: Any) -> list[str]:
        """What of this configuration cannot be prepared, in words; empty when all can."""
        lines = list(self.missing)
        for name in sorted({layer.mlp.activation for layer in self.layers}):
            lines += missing_activation(name)
        if any(layer.attention.rotary is not None for layer in self.layers):
            for rope in sorted(set(_rope_types(config)) - set(STATIC_ROPE)):
                lines.append(f"rotary type {rope!r} (known: {', '.join(STATIC_ROPE)})")
        return lines


def _check_parts(parts: Mapping[str, str], known: Mapping[str, str]) -> None:
    unknown = sorted(set(parts) - set(known))
    if unknown:
        raise ValueError(f"no such part: {', '.join(unknown)}. Known are {', '.join(known)}.")


def _rope_types(config: Any) -> list[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [r for r in rope.values() if isinstance(r, Mapping)]
    return [r.get("rope_type", "default") for r in by_layer or [rope]]


Describe = Callable[[Any], Decoder]
"""A HuggingFace config → the description of its model."""

FAMILIES: dict[str, Describe] = {}
"""Name of a HuggingFace class → how its config is read; filled by the files of `families/`."""


def family(*hf_classes: str) -> Callable[[Describe], Describe]:
    """Make a function that reads a config known under the names of HuggingFace classes."""

    def register(describe: Describe) -> Describe:
        FAMILIES.update(dict.fromkeys(hf_classes, describe))
        return describe

    return register


def without(parts: Mapping[str, str], *names: str, **changed: str) -> dict[str, str]:
    """Parts without some of them, and with others added or renamed."""
    return {k: v for k, v in parts.items() if k not in names} | changed
