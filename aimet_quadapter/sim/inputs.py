"""What a model is called with: as it was given, when nothing was given, and to prove on more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import SimError


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, `model(*args, **kwargs)`, and nothing but what was given.

    Attributes:
        args: positional inputs.
        kwargs: inputs by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> Sample:
        """A tensor, a sequence of positional inputs, or a mapping of inputs by name."""
        if isinstance(inputs, Sample):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(tuple(inputs)) if isinstance(inputs, (tuple, list)) else cls((inputs,))

    def __call__(self, model: nn.Module) -> Any:
        """What the model computes of copies: it may work in place on what it is given."""
        fresh = self.map(torch.clone)
        return model(*fresh.args, **fresh.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same with every tensor changed."""

        def apply(x: Any) -> Any:
            return change(x) if isinstance(x, Tensor) else x

        return Sample(tree_map(apply, self.args), tree_map(apply, dict(self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in order."""
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor)]

    def named(self, model: nn.Module) -> dict[str, Any]:
        """What was given, by the names of the model's forward.

        Raises:
            TypeError: the forward does not take it.
        """
        return dict(signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def with_named(self, model: nn.Module, **changes: Any) -> Sample:
        """The same with other values of some inputs, or with more inputs, by name."""
        names = list(signature(model.forward).parameters)
        places = {name: i for i, name in enumerate(names[: len(self.args)])}
        args = [changes.get(names[i], x) if i < len(names) else x for i, x in enumerate(self.args)]
        more = {k: v for k, v in changes.items() if k not in places}
        return Sample(tuple(args), {**self.kwargs, **more})


def call(model: nn.Module, inputs: Any) -> Any:
    """What `model` computes of inputs in any form that `Sample.of` takes."""
    return Sample.of(inputs)(model)


def example_inputs(sim: Any, dummy_input: Any = None) -> Any:
    """The inputs to trace a sim with: the given ones, the model's own, or random floats.

    Args:
        sim: an AIMET `QuantizationSimModel`.
        dummy_input: a tensor, a tuple or list of positional arguments, a dict of keyword
            arguments, or None.

    Returns:
        A tuple or a dict.

    Raises:
        SimError: not a sim, or an input is needed and was not given.
    """
    if not hasattr(sim, "model") or not hasattr(sim, "connected_graph"):
        raise SimError(
            f"expected an aimet_torch.QuantizationSimModel, got {type(sim).__name__}. Create one: "
            "sim = QuantizationSimModel(model, dummy_input)."
        )
    if dummy_input is not None:
        if isinstance(dummy_input, (tuple, list)):
            return tuple(dummy_input)
        return dict(dummy_input) if isinstance(dummy_input, Mapping) else (dummy_input,)
    if hasattr(sim.model, "dummy_input"):
        return sim.model.dummy_input(batch=2)
    shapes = _graph_inputs(sim)
    if not shapes or any(isinstance(m, nn.Embedding) for m in sim.model.modules()):
        raise SimError(
            "the sim does not tell what its model takes. Pass the dummy input the sim was made "
            "with: find_pairs(sim, dummy_input)."
        )
    like = _weight(sim.model)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(like) for s in shapes)


def _weight(model: nn.Module) -> Tensor:
    """A parameter of the model's own, whose type and device its inputs have."""
    own = (m for m in model.modules() if not isinstance(m, QuantizerBase))
    parameters = (p for m in own for p in m.parameters(recurse=False))
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))


def _graph_inputs(sim: Any) -> list[tuple[int, ...]]:
    """Shapes of the model's inputs; empty if the graph does not show all of them.

    AIMET makes a product for each reader of an input, named `input_<number>_to_<reader>`.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    for op in sim.connected_graph.ordered_ops:
        for product in op.inputs:
            match = re.match(r"input_(\d+)_to_", product.name)
            if product.is_model_input and match:
                shapes[int(match[1])] = tuple(product.shape)
    return [shapes[i] for i in sorted(shapes)] if set(shapes) == set(range(len(shapes))) else []


def variations(model: nn.Module, inputs: Any) -> Iterator[Sample]:
    """Other inputs that the model may take: what is exact on them too is not so by chance.

    Another batch size, another length, other values of the same shapes (token ids stay ids that
    were given), and padding on the left where the model takes an `attention_mask` and got none. A
    model that takes no such inputs raises; whoever calls it then leaves them out.

    Args:
        model: the model.
        inputs: its inputs, in any form that `Sample.of` takes.
    """
    sample = Sample.of(inputs)
    tensors = [x for x in sample.tensors() if x.dim()]
    if not tensors:
        return
    generator = torch.Generator().manual_seed(0)
    first = tensors[0]
    yield sample.map(lambda x: _doubled(x, first.shape[0]))
    yield sample.map(lambda x: _other_values(x, generator))
    if first.dim() < 2 or first.shape[1] < 2:
        return
    shorter = (first.shape[1] + 1) // 2
    yield sample.map(lambda x: _shortened(x, first.shape[1], shorter))
    if first.is_floating_point() or "attention_mask" not in signature(model.forward).parameters:
        return
    if sample.named(model).get("attention_mask") is None:
        mask = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
        mask[:, : first.shape[1] - shorter] = 0
        yield sample.with_named(model, attention_mask=mask)


def _doubled(x: Tensor, batch: int) -> Tensor:
    return torch.cat((x, x.flip(-1))) if x.dim() and x.shape[0] == batch else x


def _other_values(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x.mean() + noise * x.float().std(unbiased=False).to(x).clamp(min=1e-3)
    order = torch.randperm(x.numel(), generator=generator).to(x.device)
    return x.flatten()[order].reshape(x.shape)


def _shortened(x: Tensor, length: int, shorter: int) -> Tensor:
    return x[:, :shorter] if x.dim() > 1 and x.shape[1] == length else x
