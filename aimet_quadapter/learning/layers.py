"""A model's layers, each run again on its own inputs: all pairs inside one learn together.

A layer is an entry of one of the model's outermost module lists: a decoder layer, with its sums.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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
from .blocks import in_groups

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
    sizes: Counter[str] = Counter()
    uneven: dict[str, int] = {}
    for sample in samples:
        times: Counter[str] = Counter()

        def measure(name: str, call: Call, times: Counter[str] = times) -> None:
            times[name] += 1
            sizes[name] += call.tensors[0].nbytes  # masks and tables are those of all layers

        _run(model, sample, layers, measure)
        uneven |= {name: times[name] for name in layers if times[name] != 1}
    for name, count in uneven.items():
        _leave_out(name, f"a sample calls it {count} times")
    called = [name for name in layers if name not in uneven]
    for group in in_groups(called, (sizes[name] for name in called), budget):
        yield _capture_group(model, {name: layers[name] for name in group}, samples)


def _capture_group(
    model: nn.Module, layers: Mapping[str, tuple[Pair, ...]], samples: Sequence[Sample]
) -> list[Layer]:
    found = {name: Layer(name, model, pairs, []) for name, pairs in layers.items()}
    for sample in samples:
        # id and version → a tensor of this pass, its copy: a mask of all layers is kept once
        copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def copy(x: Any, copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = copies) -> Any:
            if not isinstance(x, Tensor):
                return x
            return copies.setdefault((id(x), x._version), (x, _copy(x)))[1]

        def keep(name: str, call: Call, copy: Callable[[Any], Any] = copy) -> None:
            found[name].calls.append(tree_map(copy, call))

        outputs: dict[str, Any] = {}
        _run(model, sample, found, keep, outputs)
    return [layer for name, layer in found.items() if _gives_again(layer, outputs[name])]


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


@torch.no_grad()
def _run(
    model: nn.Module,
    sample: Sample,
    names: Iterable[str],
    see: Callable[[str, Call], None],
    outputs: dict[str, Tensor] | None = None,
) -> None:
    """Run the unquantized model and be told what layers are called with.

    Args:
        model: a sim's model.
        sample: its inputs.
        names: of the layers.
        see: is given a layer's name and what it is called with.
        outputs: is filled with what each layer gives.
    """

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, Call(args, kwargs))

    def after(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if outputs is not None:
            outputs[name] = _copy(_output(output))

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(partial(after, name)).remove)
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(remove_all_quantizers(model))
        sample(model)


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _output(output: Any) -> Tensor:
    """The first floats that a layer returned."""
    return next(x for x in tensors_in(output) if x.is_floating_point())
