"""One decoder layer, built from its description: every forward pass of a layer is this one."""

from __future__ import annotations

from typing import Any

import torch
from aimet_torch.nn.modules.custom import Add, Multiply
from torch import Tensor, nn

from .activations import activation
from .attention import Attention, Cache, merge_heads, repeat_kv, split_heads
from .description import LAYER_PARTS, Layer
from .mixture import Mixture
from .parts import Parts
from .prepended import Prepended
from .rotary import Rotary
from .weight_map import WeightMap

NORMS = tuple(part for part in LAYER_PARTS if "_norm" in part)


class Block(Parts):
    """x + attention(norm(x)), then x + mlp(norm(x)), as the description says it.

    Args:
        layer: what it computes.
        index: its place.
        path: its name in the model.
        weights: builds its layers.
    """

    def __init__(self, layer: Layer, index: int, path: str, weights: WeightMap) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        parts = layer.parts
        for norm in NORMS:
            if norm in parts:
                self.put(norm, parts[norm], weights.norm(f"{path}.{parts[norm]}"))
        self.of_all_heads = {
            norm
            for norm in ("q_norm", "k_norm")
            if self.has(norm) and self.part(norm).weight.shape[0] != layer.attention.head_size
        }
        self._build_attention(path, weights)
        self._build_mlp(path, weights)
        self.add_attn = Add()
        self.add_mlp = Add()

    def _build_attention(self, path: str, weights: WeightMap) -> None:
        parts, attention = self.layer.parts, self.layer.attention
        rows = _projection_rows(self.layer)
        for name, order in rows.items():
            self.put(name, parts[name], weights.linear(f"{path}.{parts[name]}", order))
        scale = self.layer.branch_scale
        self.put("o", parts["o"], weights.linear(f"{path}.{parts['o']}", scale=scale))
        inside = parts["attention"]
        if attention.rotary is not None:
            for name in ("rotary_q", "rotary_k"):
                self.put(
                    name, f"{inside}.{name}", Rotary(attention.rotary_size, attention.head_size)
                )
        core = Attention(attention.heads, attention.scale, attention.softcap)
        self.put("core", f"{inside}.attention", core)

    def _build_mlp(self, path: str, weights: WeightMap) -> None:
        parts, mlp, scale = self.layer.parts, self.layer.mlp, self.layer.branch_scale
        inside = parts["mlp"]
        if mlp.experts:
            self.put("mixture", inside, Mixture(mlp, parts, path, weights, scale))
            return
        for name in ("gate", "up", "gate_up"):
            if name in parts:
                self.put(name, parts[name], weights.linear(f"{path}.{parts[name]}"))
        self.put("act", f"{inside}.act", activation(mlp.activation))
        if "gate" in parts or "gate_up" in parts:
            self.put("mul", f"{inside}.mul", Multiply())
            # An operation that AIMET quantizes on HuggingFace's model too, at `down`'s input.
            setattr(self.get_submodule(inside), "module_inputs", ("mul",))  # noqa: B010
        self.put("down", parts["down"], weights.linear(f"{path}.{parts['down']}", scale=scale))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        normed = self.apply_if("attn_norm", x)
        attended = self._attend(normed, mask, cos, sin, cache)
        summed = self.add_attn(x, self.apply_if("attn_norm_after", attended))
        summed = self.apply_if("attn_norm_sum", summed)
        if not self.layer.parallel:
            x = normed = summed
        fed = self._feed(self.apply_if("mlp_norm", x if self.has("mlp_norm") else normed))
        total = self.add_mlp(summed, self.apply_if("mlp_norm_after", fed))
        y: Tensor = self.apply_if("mlp_norm_sum", total)
        return y

    def _attend(
        self,
        x: Tensor,
        mask: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        attention = self.layer.attention
        q, k, v = self._project(x)
        q = self._heads("q_norm", q, attention.heads)
        k = self._heads("k_norm", k, attention.kv_heads)
        v = split_heads(v, attention.kv_heads)
        if attention.rotary is not None:
            q, k = self.part("rotary_q")(q, cos, sin), self.part("rotary_k")(k, cos, sin)
        if self.has("prefix_key") and not (cache is not None and cache.begun):
            k = self.part("prefix_key")(k, self._maker_of_keys())
            v = self.part("prefix_value")(v, self.part(self.maker_of_values))
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        times = attention.heads // attention.kv_heads
        y = self.part("core")(q, repeat_kv(k, times), repeat_kv(v, times), mask)
        out: Tensor = self.part("o")(merge_heads(y))
        return out

    def readers(self) -> list[tuple[str | None, list[nn.Linear]]]:
        """Each norm of the stream (its part, or None for none) and the projections behind it."""
        attention = ["qkv"] if self.has("qkv") else ["q", "k", "v"]
        readers = [self.part(part) for part in attention]
        if self.has("mixture"):
            mlp = self.part("mixture").readers()
        else:
            mlp = [self.part(p) for p in ("gate", "up", "gate_up") if self.has(p)]
        first, second = (p if self.has(p) else None for p in ("attn_norm", "mlp_norm"))
        if self.layer.parallel and second is None:
            return [(first, readers + mlp)]
        return [(first, readers), (second, mlp)]

    def writers(self) -> list[nn.Linear]:
        """The projections whose outputs are added to the stream."""
        mlp = self.part("mixture").writers() if self.has("mixture") else [self.part("down")]
        return [self.part("o"), *mlp]

    def prefix(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values (1, K, P, D) that every text is read behind; None for none."""
        names = ("prefix_key", "prefix_value")
        key, value = (self.part(n).constant.data if self.has(n) else None for n in names)
        return key, value

    def set_prefix(self, key: Tensor | None, value: Tensor | None) -> None:
        """Keep other ones, or none."""
        for name, constant in (("prefix_key", key), ("prefix_value", value)):
            if self.has(name):
                self.take_out(name)
            if constant is not None:
                inside = self.layer.parts["attention"]
                self.put(name, f"{inside}.{name}", Prepended(constant))

    @property
    def maker_of_values(self) -> str:
        """The part whose output the values are."""
        return "qkv" if self.has("qkv") else "v"

    def _maker_of_keys(self) -> Any:
        """The module whose output the keys are."""
        if self.has("rotary_k"):
            return self.part("rotary_k").add
        if self.has("k_norm"):
            return self.part("k_norm")
        return self.part("qkv" if self.has("qkv") else "k")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H·D), keys and values (B, T, K·D)."""
        if not self.has("qkv"):
            return self.part("q")(x), self.part("k")(x), self.part("v")(x)
        attention = self.layer.attention
        wide, narrow = (n * attention.head_size for n in (attention.heads, attention.kv_heads))
        q, k, v = self.part("qkv")(x).split((wide, narrow, narrow), dim=-1)
        return q, k, v

    def _heads(self, norm: str, x: Tensor, heads: int) -> Tensor:
        """(B, T, H·D) → (B, H, T, D), through a norm of all or of each head where there is one."""
        if not self.has(norm):
            return split_heads(x, heads)
        if norm in self.of_all_heads:
            return split_heads(self.part(norm)(x), heads)
        y: Tensor = self.part(norm)(split_heads(x, heads))
        return y

    def _feed(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.layer.mlp.experts:
            y = self.part("mixture")(x)
            return y
        if self.has("gate_up"):
            gate, up = self.part("gate_up")(x).chunk(2, dim=-1)
            y = self.part("mul")(self.part("act")(gate), up)
        elif self.has("gate"):
            y = self.part("mul")(self.part("act")(self.part("gate")(x)), self.part("up")(x))
        else:
            y = self.part("act")(self.part("up")(x))
        y = self.part("down")(y)
        return y


def _projection_rows(layer: Layer) -> dict[str, Tensor | None]:
    """Projection → order of HuggingFace's rows in the prepared one; None where it is the same.

    Prepared: all queries, then all keys, then all values, each head's channels in the order in
    which halves are rotated. The scores are the same for any order that queries and keys share.
    """
    a = layer.attention
    plain = torch.arange(a.head_size)
    turned = plain[: a.rotary_size]
    mixed = torch.cat((turned[::2], turned[1::2], plain[a.rotary_size :]))
    channels = mixed if a.interleaved else plain

    def rows(places: Tensor, order: Tensor) -> Tensor:
        return (places[:, None] * a.head_size + order).flatten()

    if "qkv" not in layer.parts:
        q, k = (rows(torch.arange(n), channels) for n in (a.heads, a.kv_heads))
        return {"q": q, "k": k, "v": None} if a.interleaved else dict.fromkeys(("q", "k", "v"))
    if not a.grouped and not a.interleaved:
        return {"qkv": None}
    sizes = (a.heads // a.kv_heads, 1, 1) if a.grouped else (a.heads, a.kv_heads, a.kv_heads)
    places = torch.arange(a.heads + 2 * a.kv_heads).view(-1, sum(sizes))
    q, k, v = (p.flatten() for p in places.split(sizes, dim=1))
    return {"qkv": torch.cat((rows(q, channels), rows(k, channels), rows(v, plain)))}
