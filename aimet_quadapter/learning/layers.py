"""A model's layers, each run again on its own inputs: all pairs inside one learn together.

A layer is an entry of one of the model's outermost module lists: a decoder layer, with its sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..pairs.attachment import scaled
from ..pairs.pair import Pair
from ..sim.inputs import Sample
from ..sim.outputs import tensors_in
from ..sim.ranges import all_quantizers, dynamic

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference, relative to the largest value, of a layer that is run again."""


class Call(NamedTuple):
    """What a layer was called with on one sample of the unquantized model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in order: its own input first."""
        return tensors_in((self.args, self.kwargs))


@dataclass
class Layer:
    """A layer and the pairs that lie inside it.

    Attributes:
        name: its name in the model.
        model: the sim's model.
        pairs: the pairs, in order of execution.
        calls: one for each sample.
    """

    name: str
    model: nn.Module
    pairs: tuple[Pair, ...]
    calls: list[Call]

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def modules(self) -> list[nn.Module]:
        """Itself and all that is inside."""
        return list(self.module.modules())

    @property
    def inputs(self) -> list[Tensor]:
        """What it is called with, on all samples."""
        return [x for call in self.calls for x in call.tensors]

    def __call__(self, call: Call, alphas: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output, with the quantizers in their present state.

        Args:
            call: one of `calls`.
            alphas: pair name → α; None leaves the weights as they are.
        """
        with scaled(self.model, self.pairs if alphas else (), alphas or {}):
            return _output(self.module(*call.args, **call.kwargs))

    def quantized(self) -> Any:
        """Dynamic ranges for all of the layer's quantizers."""
        return dynamic([q for module in self.modules for q in all_quantizers(module)])

    def unquantized(self) -> Any:
        """All of the layer's quantizers removed for a while."""
        return remove_all_quantizers(self.module)


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
    model: nn.Module,
    layers: Mapping[str, tuple[Pair, ...]],
    samples: Sequence[Sample],
    budget: int,
) -> Iterator[list[Layer]]:
    """The layers with what they are called with, a group at a time.

    A layer that a sample does not call just once, or that gives something else when it is called
    again, is left out, with a warning that says so.

    Args:
        model: a sim's model.
        layers: what `layers_of` found.
        samples: inputs of the model.
        budget: bytes of inputs held at a time.
    """
    sizes, counts = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def measure(name: str, call: Call) -> None:
        counts[name] += 1
        sizes[name] += call.tensors[0].nbytes  # masks and tables are those of all layers

    for sample in samples:
        _run(model, sample, layers, measure)
    for name, count in counts.items():
        if count != len(samples):
            _leave_out(name, f"{len(samples)} samples call it {count} times")
    called = [name for name, count in counts.items() if count == len(samples)]
    for group in _groups(called, sizes, budget):
        yield _capture_group(model, {name: layers[name] for name in group}, samples)


def _capture_group(
    model: nn.Module, layers: Mapping[str, tuple[Pair, ...]], samples: Sequence[Sample]
) -> list[Layer]:
    found = {name: Layer(name, model, pairs, []) for name, pairs in layers.items()}
    outputs: dict[str, Tensor] = {}
    for sample in samples:
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # id → a tensor of this pass, its copy

        def copy(x: Any, copies: dict[int, tuple[Tensor, Tensor]] = copies) -> Any:
            if not isinstance(x, Tensor):
                return x
            return copies.setdefault(id(x), (x, x.detach().clone()))[1]

        outputs = _run(
            model, sample, found, lambda name, call: found[name].calls.append(tree_map(copy, call))
        )
    return [layer for name, layer in found.items() if _gives_again(layer, outputs[name])]


def _groups(names: Sequence[str], sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(sizes[n] for n in group) + sizes[name] > budget:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


@torch.no_grad()
def _gives_again(layer: Layer, expected: Tensor) -> bool:
    """Whether the layer gives on the last sample what it gave."""
    with layer.unquantized(), in_eval_mode(layer.module):
        got = layer(layer.calls[-1])
    if got.shape != expected.shape:
        _leave_out(layer.name, f"it gives {tuple(got.shape)} when it is called again")
        return False
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:
        _leave_out(layer.name, f"called again it differs by {error:.2g} of its largest value")
        return False
    return True


def _leave_out(name: str, reason: str) -> None:
    _log.warning("the pairs in %s are calibrated one by one: %s", name, reason)


@torch.no_grad()
def _run(
    model: nn.Module, sample: Sample, names: Iterable[str], see: Callable[[str, Call], None]
) -> dict[str, Tensor]:
    """Run the unquantized model, be told what layers are called with; what each gave at last."""
    outputs: dict[str, Tensor] = {}

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, Call(args, kwargs))

    def after(name: str, _: nn.Module, __: Any, output: Any) -> None:
        outputs[name] = _output(output)

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(partial(after, name)).remove)
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(remove_all_quantizers(model))
        sample(model)
    return outputs


def _output(output: Any) -> Tensor:
    """The first floats that a layer returned."""
    return next(x for x in tensors_in(output) if x.is_floating_point())
