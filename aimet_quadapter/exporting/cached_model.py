"""A prompt graph and a one-token graph around the model of a sim, with a cache of fixed size.

Both call the sim's own quantized modules, so their encodings are the sim's. Which quantizer the
keys and values of a layer carry is read from a recording of the model, not from its architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from ..encodings.encoding import quantizer
from ..encodings.sources import source_of
from ..errors import CoverageError, SimError
from ..models import PreparedDecoder
from ..models.attention import Recorded
from ..sim.trace import record

CACHE_TOLERANCE = 1e-3
"""How far logits with and without a cache may differ in fp32, of the largest logit."""


@dataclass(frozen=True)
class Cached:
    """The keys or the values of one layer.

    Attributes:
        name: "key_0", "value_0", "key_1", …: an output of both graphs; "past_" and this is an
            input of the one-token graph.
        heads: key/value heads K.
        size: size of a head D.
        producer: the module that makes them.
        quantizer: the quantizer at its output.
    """

    name: str
    heads: int
    size: int
    producer: str
    quantizer: Any

    def empty(self, length: int) -> Tensor:
        """Zeros (1, K, length, D)."""
        return torch.zeros(1, self.heads, length, self.size)


class _Past(Recorded):
    """A cache that holds what came before, quantized as what comes now."""

    begun = True

    def __init__(self, past: Sequence[Tensor], quantizers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.past = [q(x) for q, x in zip(quantizers, past, strict=True)]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().update(layer, key, value)
        past_key, past_value = self.past[2 * layer : 2 * layer + 2]
        return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)


class PromptGraph(nn.Module):
    """Token ids (1, P) → logits (1, P, V), then keys and values (1, K, P, D) of each layer.

    A shorter prompt is padded on the right: the causal mask hides the padding. Keys and values of
    the model's prefix, if it has one, come first: (1, K, prefix + P, D).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        cache = Recorded()
        return (self.model(input_ids, cache=cache), *cache.tensors)


class DecodeGraph(nn.Module):
    """One token and the cache → its logits and its keys and values.

    Token id (1, 1), position (1, 1), additive mask (1, 1, 1, N) and keys and values
    (1, K, N − 1, D) of each layer → logits (1, 1, V), new keys and values (1, K, 1, D). The new
    token is the last of the N that attention sees; the order of the others does not matter.
    """

    def __init__(self, model: nn.Module, quantizers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.quantizers = nn.ModuleList(quantizers)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = _Past(past, list(self.quantizers))
        return (self.model(input_ids, mask, position_ids, cache=cache), *cache.tensors)


class _Marked(nn.Module):
    """The model with a module of its own at each tensor that goes into the cache."""

    begun = False

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.keys = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.values = nn.ModuleList(nn.Identity() for _ in range(layers))

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys[layer](key), self.values[layer](value)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, cache=self)


def find_cached(model: Any) -> list[Cached]:
    """Keys and values of each layer, in the order of the graphs' outputs, with their quantizers.

    Args:
        model: a sim's `model`, made by `prepare`.

    Raises:
        SimError: the model takes no cache, or computes something else with one.
        CoverageError: a layer's keys or values carry no single encoding per tensor.
    """
    if not isinstance(model, PreparedDecoder):
        raise SimError(
            f"{type(model).__name__} takes no cache of keys and values: make the sim from "
            "prepare(model)."
        )
    (ids,) = model.dummy_input(length=4)
    shapes = _check_cache(model, ids)
    marked = _Marked(model, len(shapes) // 2)
    trace = record(marked, (ids,))
    marks = {node.name: node for node in trace.nodes}
    found = []
    for i, shape in enumerate(shapes):
        kind, layer = ("key", "value")[i % 2], i // 2
        source = source_of(trace, marks[f"{kind}s.{layer}"].inputs[0])
        module = source.module if source is not None else None
        own = quantizer(module, "output_quantizers", 0)
        if source is None or own is None or tuple(own.shape):
            raise CoverageError(
                f"the {kind}s of layer {layer}, made by "
                f"{source.name.removeprefix('model.') if source else 'several operations'}, carry "
                "no encoding per tensor, so the cache has none. Leave the sim the quantizers that "
                "its config file gives it (keep_module_sites takes some away)."
            )
        name = source.name.removeprefix("model.")
        found.append(Cached(f"{kind}_{layer}", shape[1], shape[3], name, own))
    return found


def _check_cache(model: Any, ids: Tensor) -> list[torch.Size]:
    """Compare logits with and without a cache, quantizers off; shapes of what it holds."""
    last = ids.shape[1] - 1
    held = len(model.prefix) + last
    length = held + 2  # one place of the cache stays unused
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        expected = model(ids)[:, -1]
        _, *new = PromptGraph(model)(ids[:, :last])
        past = [nn.functional.pad(x, (0, 0, 0, 1)) for x in new]
        mask = torch.zeros(1, 1, 1, length, device=ids.device)
        mask[..., held:-1] = model.mask_value
        graph = DecodeGraph(model, [nn.Identity() for _ in new])
        position = torch.tensor([[held]], device=ids.device)
        logits = graph(ids[:, last:], position, mask, *past)[0][:, -1]
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= CACHE_TOLERANCE:
        raise SimError(
            f"with a cache {model.hf_class} computes other logits (by {difference:.1e} of the "
            "largest): generation from this sim would say something else than the sim."
        )
    return [x.shape for x in new]
