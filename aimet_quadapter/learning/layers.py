"""A model's layers, each run again on its own inputs: all pairs inside one learn together.

A layer is an entry of one of the model's outermost module lists: a decoder layer, with its sums.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..pairs.attachment import scaled
from ..pairs.pair import Pair
from ..sim.inputs import Sample
from ..sim.outputs import tensors_in
from ..sim.padding import same
from ..sim.ranges import all_quantizers, dynamic
from ..sim.replay import Replay
from ..sim.trace import Span, Trace, Value
from .blocks import in_groups, ways

_log = logging.getLogger(__name__)


class Call(NamedTuple):
    """What a layer was called with on one sample of the unquantized model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return tensors_in((self.args, self.kwargs))


@dataclass
class Layer:
    """A layer and the pairs that lie inside it.

    Attributes:
        name: its name in the model.
        model: the sim's model.
        pairs: the pairs, in order of execution.
        calls: one for each sample.
        quantized_calls: the same as they are when the layer before is quantized; `calls` where
            nobody said.
    """

    name: str
    model: nn.Module
    pairs: tuple[Pair, ...]
    calls: list[Call]
    quantized_calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quantized_calls = self.quantized_calls or self.calls

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def modules(self) -> list[nn.Module]:
        """Itself and all that is inside, its quantizers left out."""
        return [m for m in self.module.modules() if not isinstance(m, QuantizerBase)]

    @property
    def inputs(self) -> list[Tensor]:
        """What it is called with, on all samples."""
        calls = self.calls
        if self.quantized_calls is not calls:
            calls = [*calls, *self.quantized_calls]
        return [x for call in calls for x in call.tensors]

    def __call__(self, call: Call, alphas: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output, with the quantizers in their present state.

        Args:
            call: one of `calls`, or of `quantized_calls`.
            alphas: pair name → α; None leaves the weights as they are.
        """
        args, kwargs = tree_map(_copy, call)  # a layer may work in place
        with scaled(self.model, self.pairs if alphas else (), alphas or {}):
            return _output(self.module(*args, **kwargs))

    def quantized(self) -> Any:
        """Dynamic ranges for all of the layer's quantizers."""
        return dynamic([q for m in self.module.modules() for q in all_quantizers(m)])

    def unquantized(self) -> Any:
        """All of the layer's quantizers removed for a while."""
        return remove_all_quantizers(self.module)


class Passed(NamedTuple):
    """What a layer gives to the next one on one sample."""

    unquantized: Tensor
    quantized: Tensor


@torch.no_grad()
def passed_on(layer: Layer, alphas: Mapping[str, Tensor]) -> list[Passed]:
    """What a layer gives on each sample, without and with its quantizers, α in its weights."""
    with layer.unquantized():
        plain = [layer(call) for call in layer.calls]
    with layer.quantized():
        quantized = [layer(call, alphas) for call in layer.quantized_calls]
    return [Passed(*both) for both in zip(plain, quantized, strict=True)]


def take_up(layer: Layer, passed: Sequence[Passed]) -> None:
    """Let a layer read what the one before gives with quantizers, where it reads what it gives.

    A layer that reads something else keeps its calls, with a warning that says so.
    """
    calls = []
    for call, (plain, quantized) in zip(layer.calls, passed, strict=True):
        taken = 0

        def replaced(x: Any, plain: Tensor = plain, quantized: Tensor = quantized) -> Any:
            nonlocal taken
            if isinstance(x, Tensor) and x.shape == plain.shape and same(x, plain):
                taken += 1
                return quantized
            return x

        calls.append(tree_map(replaced, call))
        if not taken:
            _log.warning(
                "%s does not read what the layer before it gives: it is calibrated on its "
                "unquantized inputs",
                layer.name,
            )
            return
    layer.quantized_calls = calls


def layers_of(model: nn.Module, pairs: Sequence[Pair]) -> dict[str, tuple[Pair, ...]]:
    """Name of each layer that holds pairs wholly → those pairs, in order."""
    entries = [
        f"{name}.{i}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for i in range(len(module))
    ]
    outermost = [e for e in entries if not any(e.startswith(f"{other}.") for other in entries)]
    found: dict[str, tuple[Pair, ...]] = {}
    for pair in pairs:
        modules = {pair.producer, *pair.consumers, *(s.module for s in pair.scales)}
        for entry in outermost:
            if all(m.startswith(f"{entry}.") for m in modules):
                found[entry] = (*found.get(entry, ()), pair)
    return found


def capture_layers(
    sim: Any,
    layers: Mapping[str, tuple[Pair, ...]],
    samples: Sequence[Sample],
    budget: int,
    plans: Sequence[Trace] | None = None,
) -> Iterator[list[Layer]]:
    """The layers with what they are called with in the unquantized model, a group at a time.

    A layer that a sample does not call just once, or that gives something else when it is called
    again, is left out, with a warning that says so.

    Args:
        sim: the sim.
        layers: what `layers_of` found.
        samples: inputs of the model.
        budget: bytes of inputs held at a time.
        plans: the samples' `ways`, where they are known.
    """
    plans = ways(sim, samples) if plans is None else plans
    called = list(_called_once(layers, plans))
    sizes = [sum(_size(plan, name) for plan in plans) for name in called]
    replays = [Replay(sim.model, *both) for both in zip(plans, samples, strict=True)]
    done = 0
    for group in in_groups(called, sizes, budget):
        done += len(group)
        yield _capture_group({name: layers[name] for name in group}, called[done:], replays)


def _called_once(names: Iterable[str], plans: Sequence[Trace]) -> Iterator[str]:
    for name in names:
        times = (len(plan.spans.get(name, ())) for plan in plans)
        uneven = [count for count in times if count != 1]
        if uneven:
            _leave_out(name, f"a sample calls it {uneven[-1]} times")
        else:
            yield name


def _size(plan: Trace, name: str) -> int:
    """Bytes of the first tensor that a layer is called with: masks and tables are all layers'."""
    first = next(iter(plan.spans[name][0].inputs), None)
    if first is None or first.index not in plan.shapes:
        return 0
    return plan.shapes[first.index].numel() * plan.dtypes[first.index].itemsize


def _capture_group(
    layers: Mapping[str, tuple[Pair, ...]], rest: Sequence[str], replays: Sequence[Replay]
) -> list[Layer]:
    """The layers of a group, whose samples go on to its end; `rest` are the layers behind it."""
    found = {name: Layer(name, replays[0].model, pairs, []) for name, pairs in layers.items()}
    for replay in replays:
        spans = [replay.trace.spans[name][0] for name in found]
        later = _seen(replay.trace.spans[name][0] for name in rest)
        kept = replay.until(max(span.stop for span in spans), _seen(spans), later)

        def look_up(x: Any, kept: dict[int, Tensor] = kept) -> Any:
            return kept[x.index] if isinstance(x, Value) else x

        for layer, span in zip(found.values(), spans, strict=True):
            layer.calls.append(Call(*tree_map(look_up, (span.args, span.kwargs))))
    given = [_output([kept[v.index] for v in span.outputs]) for span in spans]  # by the last sample
    both = zip(found.values(), given, strict=True)
    return [layer for layer, expected in both if _gives_again(layer, expected)]


def _seen(spans: Iterable[Span]) -> set[int]:
    """Indices of the values that some layers are called with, and of those that they give."""
    return {value.index for span in spans for value in (*span.inputs, *span.outputs)}


@torch.no_grad()
def _gives_again(layer: Layer, expected: Any) -> bool:
    """Whether the layer gives on the last sample what it gave; else it says why it is left out."""
    try:
        with layer.unquantized(), in_eval_mode(layer.module):
            got = layer(layer.calls[-1])
    except Exception as error:  # noqa: BLE001  whatever one raises that keeps something
        _leave_out(layer.name, f"called again it raises {type(error).__name__}: {error}")
        return False
    if got.dim() < 2:
        _leave_out(layer.name, f"its output has the shape {tuple(got.shape)}: no rows")
        return False
    if bool(expected.isfinite().all()) and not same(got, expected):
        _leave_out(layer.name, "called again it gives other values")
        return False
    return True


def _leave_out(name: str, reason: str) -> None:
    _log.warning("the pairs in %s are calibrated one by one: %s", name, reason)


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _output(output: Any) -> Tensor:
    """The first floats that a layer returned."""
    return next(x for x in tensors_in(output) if x.is_floating_point())
