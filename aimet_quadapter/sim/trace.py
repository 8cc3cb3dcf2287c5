"""Record what a model computes, operation by operation, on real tensors.

AIMET's ConnectedGraph loses which output of a split is which and does not list every consumer of
a tensor; a recording of one forward pass has both, works on any model that runs, and holds what
is needed to run a part of the model again.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .inputs import Sample
from .outputs import tensors_in


@dataclass(frozen=True)
class Value:
    """A tensor of the recording: the `index`-th that was made. Same index in every recording."""

    index: int


@dataclass(frozen=True)
class Node:
    """One call of a leaf module or of a function outside any leaf module.

    Attributes:
        index: place in the order of execution.
        name: the module's name in the model, or the function's name.
        target: the module or function that was called.
        args, kwargs: what it was called with, tracked tensors replaced by their `Value`.
        outputs: the values it made.
        shapes: shape of each of `outputs`.
    """

    index: int
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def module(self) -> nn.Module | None:
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def empty(self) -> bool:
        """Whether it made tensors without elements only: nothing of what it does is seen."""
        return bool(self.shapes) and not any(shape.numel() for shape in self.shapes)

    @functools.cached_property
    def inputs(self) -> list[Value]:
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Value)]

    def run(self, values: dict[int, Tensor]) -> Any:
        """Call the target again, each `Value` replaced by `values[index]`."""

        def look_up(x: Any) -> Any:
            return values[x.index] if isinstance(x, Value) else x

        return self.target(*tree_map(look_up, self.args), **tree_map(look_up, self.kwargs))


@dataclass(frozen=True)
class Span:
    """One call of a module that holds leaf modules, such as a decoder layer.

    Attributes:
        args, kwargs: what it was called with, tracked tensors replaced by their `Value`.
        outputs: the tracked tensors that it gave.
        stop: index of the last node inside.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    stop: int

    @functools.cached_property
    def inputs(self) -> list[Value]:
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Value)]


@dataclass
class Trace:
    """A recorded forward pass.

    Attributes:
        nodes: every operation, in order of execution.
        spans: name of a module that holds leaf modules → its calls.
        inputs: indices of the values the model was called with.
        outputs: indices of the values the model returned.
        dtypes: dtype of every value.
    """

    nodes: list[Node] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)

    @functools.cached_property
    def shapes(self) -> dict[int, torch.Size]:
        """Value index → its shape, of all that nodes made."""
        made = (both for n in self.nodes for both in zip(n.outputs, n.shapes, strict=True))
        return {value.index: shape for value, shape in made}

    @functools.cached_property
    def readers(self) -> dict[int, list[Node]]:
        """Value index → the nodes that read it, in order of execution."""
        readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in {v.index: v for v in node.inputs}:
                readers.setdefault(value, []).append(node)
        return readers

    @functools.cached_property
    def done_after(self) -> dict[int, list[int]]:
        """Node index → the values that nothing behind it reads, and something up to it did."""
        last = {v: node.index for node in self.nodes for v in (x.index for x in node.outputs)}
        last |= {v: readers[-1].index for v, readers in self.readers.items()}
        done: dict[int, list[int]] = {node.index: [] for node in self.nodes}
        for value, node in last.items():
            done[node].append(value)
        return done

    @functools.cached_property
    def constants(self) -> list[tuple[Tensor, str]]:
        """Each untracked tensor that a function reads (a weight), and the function's name."""
        return [
            (x, n.name)
            for n in self.nodes
            if n.module is None
            for x in tree_leaves((n.args, n.kwargs))
            if isinstance(x, Tensor)
        ]

    @functools.cached_property
    def form(self) -> tuple[Any, ...]:
        """The way a sample took: what was called on which values and weights.

        Two recordings of one form differ in `settings` only.
        """

        def operand(x: Any) -> tuple[str, int]:
            return ("value", x.index) if isinstance(x, Value) else ("weight", id(x))

        def operands(node: Node) -> tuple[tuple[str, int], ...]:
            leaves = tree_leaves((node.args, node.kwargs))
            return tuple(operand(x) for x in leaves if isinstance(x, (Value, Tensor)))

        return tuple((n.name, operands(n), n.empty, len(n.outputs)) for n in self.nodes)

    @functools.cached_property
    def settings(self) -> tuple[str, ...]:
        """What else everything was called with: axes, places, lengths, factors."""

        def setting(x: Any) -> Any:
            return None if isinstance(x, (Value, Tensor)) else x

        return tuple(repr(tree_map(setting, (n.args, n.kwargs))) for n in self.nodes)

    @functools.cached_property
    def calls(self) -> Counter[int]:
        """How often each module was called, by `id`."""
        return Counter(id(n.target) for n in self.nodes)

    @functools.cached_property
    def ran(self) -> frozenset[int]:
        """The modules that were given anything to compute, by `id`."""
        return frozenset(id(n.target) for n in self.nodes if not n.empty)


HIDDEN_READS = frozenset(
    "item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ __contains__ "  # noqa: SIM905
    "equal allclose is_nonzero".split()
)
"""Functions that read a tensor and return none: recorded, since what they read is not free."""


def is_leaf(module: nn.Module) -> bool:
    """A module recorded as one operation: AIMET's quantized ones and those without children."""
    return isinstance(module, BaseQuantizationMixin) or not any(module.children())


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.names = {m: n for n, m in model.named_modules()}
        self.values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.count = 0
        self.depth = 0
        self.open: list[Any] = []  # what the modules were called with that are not done

    def new_value(self, tensor: Tensor) -> Value:
        value = Value(self.count)
        self.count += 1
        self.values[tensor] = value
        self.trace.dtypes[value.index] = tensor.dtype
        return value

    def add(self, name: str, target: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        node = Node(
            len(self.trace.nodes),
            name,
            target,
            args,
            kwargs,
            tuple(self.new_value(t) for t in tensors),
            tuple(t.shape for t in tensors),
        )
        self.trace.nodes.append(node)

    def look_up(self, tree: Any) -> Any:
        return tree_map(lambda x: self.values.get(x, x) if isinstance(x, Tensor) else x, tree)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        recorded, named = self.look_up((args, kwargs))  # before the call: it may work in place
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # an attribute such as x.T
            name = func.__self__.__name__
        if name == "__setitem__":
            self.add(
                name, func, recorded, named, args[0]
            )  # returns nothing, writes into its target
        elif name in HIDDEN_READS or any(isinstance(t, Tensor) for t in tree_leaves(out)):
            self.add(name, func, recorded, named, out)
        return out

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.depth:
            self.pending = self.look_up((args, kwargs))
        self.depth += 1

    def leave(self, module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        self.depth -= 1
        if not self.depth:
            args, kwargs = self.pending
            self.add(self.names[module], module, args, kwargs, out)

    def begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.open.append(self.look_up((args, kwargs)))

    def end(self, module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        args, kwargs = self.open.pop()
        values = tuple(v for v in self.look_up(tensors_in(out)) if isinstance(v, Value))
        span = Span(args, kwargs, values, len(self.trace.nodes) - 1)
        self.trace.spans.setdefault(self.names[module], []).append(span)


def record(model: nn.Module, inputs: Any) -> Trace:
    """Run the model without quantizers, without gradients, in eval mode, and record it.

    Args:
        model: any module; of a sim, `sim.model`.
        inputs: inputs of its forward, in any form that `Sample.of` takes.
    """
    recorder = _Recorder(model)
    handles = []
    for module in model.modules():
        first, last = recorder.begin, recorder.end
        if is_leaf(module) and not isinstance(module, nn.ModuleList):
            first, last = recorder.enter, recorder.leave
        handles.append(module.register_forward_pre_hook(first, with_kwargs=True))
        handles.append(module.register_forward_hook(last, with_kwargs=True))
    try:
        with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
            fresh = Sample.of(inputs).map(torch.clone)  # the model may work in place on it
            values = [recorder.new_value(t) for t in fresh.tensors()]
            recorder.trace.inputs = frozenset(v.index for v in values)
            with recorder:
                out = model(*fresh.args, **fresh.kwargs)
            found = recorder.look_up(tensors_in(out))
            recorder.trace.outputs = frozenset(v.index for v in found if isinstance(v, Value))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.trace


def recordings(model: nn.Module, samples: Iterable[Any]) -> Iterator[Trace]:
    """A recording for each sample, in order.

    Where the model says that its operations depend on nothing but what it is given and the shapes
    of that (`fixed_graph`, as what `prepare` makes), samples that are alike share one.

    Args:
        model: any module; of a sim, `sim.model`.
        samples: inputs of its forward, in any form that `Sample.of` takes.
    """
    known: dict[str, Trace] = {}
    for sample in map(Sample.of, samples):
        form = repr(tree_map(_without_values, (sample.args, dict(sample.kwargs))))
        if not getattr(model, "fixed_graph", False) or form not in known:
            known[form] = record(model, sample)
        yield known[form]


def _without_values(x: Any) -> Any:
    return (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else x
