"""A prepared decoder, built from its description: its forward, `generate`, what it is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from aimet_torch.adascale.adascale_optimizer import (
    AdaScaleModelConfig,
    adascale_model_config_dict,
)
from aimet_torch.nn.modules.custom import Add, Multiply
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import MASK_VALUE, Cache, additive_mask, alibi_slopes, constant, factor
from .block import Block
from .description import Decoder
from .generation import HuggingFaceGenerator
from .parts import Parts
from .rotary import look_up, rotary_tables
from .weight_map import WeightMap


class PreparedDecoder(Parts):
    """A causal language model in which every device operation is a module AIMET can quantize.

    Dropout is left out: a prepared model has no training-mode noise.

    Args:
        hf: the HuggingFace model. It is left as it is.
        description: what it computes.
        share: see `prepare`.

    Attributes:
        hf_class: name of the HuggingFace class it stands for.
        description: see `Decoder`.
        weights: where each of its parameters lies in HuggingFace's model, both ways.
        mask_value: added to the score of a position that must not be seen; `prepare` chooses it.
        prefix: tokens whose keys and values are constants of the model: every text is read behind
            them and begins at position P, their number. `set_prefix` chooses them.
        rotation: arguments of `rotate` by which the stream was turned, None where it was not.
    """

    fixed_graph = True
    """No branch on values: inputs of the same shapes take one way (`sim.trace.recordings`)."""

    slopes: Tensor
    logit_cap: Tensor

    def __init__(self, hf: Any, description: Decoder, share: bool = False) -> None:
        super().__init__()
        self.hf_class = type(hf).__name__
        self.config = copy.deepcopy(hf.config)
        self.generation_config: Any = copy.deepcopy(getattr(hf, "generation_config", None))
        self.description = description
        self.mask_value = MASK_VALUE
        self.prefix: tuple[int, ...] = ()
        self.rotation: dict[str, Any] | None = None
        weights = WeightMap(hf, share)
        self._build_embedding(weights)
        blocks = description.parts["blocks"]
        layers = enumerate(description.layers)
        self.put(
            "blocks",
            blocks,
            nn.ModuleList(Block(layer, i, f"{blocks}.{i}", weights) for i, layer in layers),
        )
        self._build_head(weights)
        self._build_tables(weights)
        self.weights = tuple(weights.weights)

    def _build_embedding(self, weights: WeightMap) -> None:
        parts, description = self.description.parts, self.description
        scale = description.embedding_scale
        self.put("embed", parts["embed"], weights.embedding(parts["embed"], scale))
        if "project_in" in parts:
            self.put("project_in", parts["project_in"], weights.linear(parts["project_in"]))
        if "positions" in parts:
            table = weights.embedding(parts["positions"], skip=description.position_offset)
            self.put("positions", parts["positions"], table)
            *holder, _ = parts["positions"].split(".")
            self.put("add_embeddings", ".".join((*holder, "add_embeddings")), Add())
        if "embed_norm" in parts:
            self.put("embed_norm", parts["embed_norm"], weights.norm(parts["embed_norm"]))

    def _build_head(self, weights: WeightMap) -> None:
        parts, cap = self.description.parts, self.description.logit_softcap
        if "final_norm" in parts:
            self.put("final_norm", parts["final_norm"], weights.norm(parts["final_norm"]))
        if "project_out" in parts:
            self.put("project_out", parts["project_out"], weights.linear(parts["project_out"]))
        scale = self.description.logit_scale / (cap or 1.0)
        self.put("head", parts["head"], weights.linear(parts["head"], scale=scale))
        if cap is not None:
            self.logit_tanh = nn.Tanh()
            self.scale_logits = Multiply()
            words = self.part("head").out_features
            self.register_buffer("logit_cap", factor(words, cap).flatten(), persistent=False)

    def _build_tables(self, weights: WeightMap) -> None:
        """Rotary tables and slopes as buffers, in fp32 whatever the weights are."""
        described = [layer.attention for layer in self.description.layers]
        rotated = {
            (a.rotary, a.rotary_size, a.head_size) for a in described if a.rotary is not None
        }
        for name, size, head_size in sorted(rotated):
            module = weights.module(self.description.parts["rotary"])
            positions = self.description.positions or 0
            tables = rotary_tables(module, name, positions, size, head_size)
            for kind, table in zip(("cos", "signed_sin"), tables, strict=True):
                self.register_buffer(_table(kind, name), table, persistent=False)
        for heads in {a.heads for a in described if a.alibi}:
            self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    @property
    def default_kinds(self) -> tuple[str, ...]:
        """Kinds of pairs that `apply_quadapter` uses unless told otherwise."""
        return self.description.kinds

    @property
    def has_rms_norms(self) -> bool:
        """Whether all norms are RMSNorms, so that nothing takes a mean off the stream."""
        return not any(isinstance(module, nn.LayerNorm) for module in self.modules())

    @property
    def residual_writers(self) -> tuple[str, ...]:
        """Patterns of the modules whose output is added to the residual stream."""
        found = set()
        for layer in self.description.layers:
            parts = layer.parts
            attention = parts.get("attn_norm_after", parts["o"])
            mlp = f"{parts['mlp']}.add.*" if layer.mlp.experts else parts.get("down")
            found |= {f"*.{attention}", f"*.{parts.get('mlp_norm_after', mlp)}"}
        return tuple(sorted(found))

    @property
    def residual_sums(self) -> tuple[str, ...]:
        """Patterns of the sums that are the residual stream."""
        return ("*.add_embeddings", "*.add_attn", "*.add_mlp")

    def held_values(self) -> dict[str, str]:
        """Name of the module with the values of a prefix → that of the one that makes a text's."""
        found = {}
        for i, block in enumerate(self.part("blocks") if self.prefix else ()):
            path = f"{self.path('blocks')}.{i}"
            maker = f"{path}.{block.path(block.maker_of_values)}"
            found[f"{path}.{block.path('prefix_value')}"] = maker
        return found

    @contextmanager
    def without_prefix(self) -> Iterator[None]:
        """Read texts without the prefix for a while."""
        ids, blocks = self.prefix, self.part("blocks")
        held = [block.prefix() for block in blocks]
        try:
            self.prefix = ()
            for block in blocks:
                block.set_prefix(None, None)
            yield
        finally:
            self.prefix = ids
            for block, (key, value) in zip(blocks, held, strict=True):
                block.set_prefix(key, value)

    def check_cache(self, length: int) -> None:
        """Refuse a cache of keys and values that this model cannot be given.

        Args:
            length: tokens that attention sees.

        Raises:
            UnsupportedModelError: scores depend on the positions of the keys (ALiBi), or a window
                is shorter: places of a cache have no order, so neither is known.
        """
        layers = [layer.attention for layer in self.description.layers]
        if any(a.alibi for a in layers):
            raise UnsupportedModelError(
                f"{self.hf_class} adds ALiBi positions to the scores of cached keys, whose "
                "positions a cache does not hold: generation cannot be exported. Export the model "
                "for whole texts (export)."
            )
        window = min((a.window for a in layers if a.window is not None), default=length)
        if window < length:
            raise UnsupportedModelError(
                f"a cache of {length} tokens is longer than the sliding window of {window} in some "
                f"layers of {self.hf_class}, and a cache does not say which tokens are outside. "
                f"Make it at most {window} tokens long."
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Token ids (B, T) → logits (B, T, V).

        Args:
            input_ids: token ids (B, T).
            attention_mask: 1 where a token counts and 0 where it is padding (B, T); or an
                additive float mask (B or 1, 1, T, S) used as it is, S = T without a cache; or a
                bool mask of that shape, true where a position is seen.
            position_ids: positions (B, T), a prefix counted; P … P+T−1 when not given, or counted
                over what is not padding, as HuggingFace's model does.
            cache: gives each layer the keys and values of earlier tokens; a cache that holds some
                needs a 4-D mask and `position_ids`.
        """
        if position_ids is None and self.description.positions_from_mask:
            position_ids = _counted(attention_mask, len(self.prefix))
        x = self._embed(input_ids, position_ids)
        masks: dict[int | None, Tensor] = {}
        tables: dict[str | None, dict[str, Tensor]] = {None: {}}
        for block, layer in zip(self.part("blocks"), self.description.layers, strict=True):
            window, rotary = layer.attention.window, layer.attention.rotary
            if window not in masks:
                masks[window] = self._mask(attention_mask, x, window, cache)
            if rotary is not None and rotary not in tables:
                tables[rotary] = self._rotary(rotary, position_ids, x)
            x = block(x, mask=masks[window], cache=cache, **tables[rotary])
        x = self.apply_if("project_out", self.apply_if("final_norm", x))
        logits: Tensor = self.part("head")(x)
        if self.description.logit_softcap is None:
            return logits
        capped: Tensor = self.scale_logits(self.logit_tanh(logits), constant(self.logit_cap, x))
        return capped

    def _embed(self, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        x: Tensor = self.apply_if("project_in", self.part("embed")(ids))  # (B, T, C)
        if self.has("positions"):
            if position_ids is None:
                begin = len(self.prefix)
                position_ids = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
            x = self.part("add_embeddings")(x, self.part("positions")(position_ids))
        y: Tensor = self.apply_if("embed_norm", x)
        return y

    def _mask(
        self, attention_mask: Tensor | None, x: Tensor, window: int | None, cache: Cache | None
    ) -> Tensor:
        prefix = 0 if cache is not None and cache.begun else len(self.prefix)
        mask = additive_mask(attention_mask, x, self.mask_value, window, prefix)
        if not any(layer.attention.alibi for layer in self.description.layers):
            return mask
        keys = torch.arange(mask.shape[-1], device=x.device)
        return mask + constant(self.slopes, x) * keys  # (B or 1, H, T, S)

    def _rotary(self, name: str, position_ids: Tensor | None, x: Tensor) -> dict[str, Tensor]:
        cos, sin = (getattr(self, _table(kind, name)) for kind in ("cos", "signed_sin"))
        if position_ids is None:
            begin = len(self.prefix)
            rows = [table[begin : begin + x.shape[1]] for table in (cos, sin)]  # (T, D)
        else:
            rows = [look_up(table, position_ids) for table in (cos, sin)]
        return {"cos": constant(rows[0], x), "sin": constant(rows[1], x)}

    def dummy_input(self, batch: int = 1, length: int = 8) -> tuple[Tensor]:
        """Token ids (batch, length), the same at every call, for tracing and export."""
        ids = torch.arange(batch * length).reshape(batch, length) * 7 + 11
        return ((ids % self.config.vocab_size).to(next(self.parameters()).device),)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers`' `generate` on this model; same arguments, same tokens, no cache."""
        generator: Any = self.as_huggingface()
        return generator.generate(*args, **kwargs | {"use_cache": False})

    def as_huggingface(self) -> HuggingFaceGenerator:
        """This model behind HuggingFace's interface, for tools that want `output.logits`.

        A `PreTrainedModel` on this model's own weights and quantizers, for `generate` and for
        evaluation harnesses; nothing is copied.
        """
        model = HuggingFaceGenerator(self)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model


def _table(kind: str, name: str) -> str:
    return f"{kind}_{name}" if name else kind


def _counted(attention_mask: Tensor | None, begin: int) -> Tensor | None:
    """Positions counted from `begin` over what is not padding; None where nothing is said."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    mask = attention_mask.long()
    return begin + (mask.cumsum(-1) * mask - 1).clamp(min=0)


# AdaScale finds a model's blocks by their class and, of a model that it does not know, changes
# nothing without a word.
adascale_model_config_dict[PreparedDecoder] = AdaScaleModelConfig(block_type=Block)
