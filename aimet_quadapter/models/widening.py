"""Half-precision modules that compute in fp32, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)

Weights = Callable[[nn.Module], Mapping[str, Tensor]]
"""A module in fp32 → parameters to compute with instead of its own."""

NO_WEIGHTS: Mapping[str, Weights] = MappingProxyType({})


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers, not its children's."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


@contextmanager
def module_by_module_in_float32(
    model: nn.Module, weights: Mapping[str, Weights] = NO_WEIGHTS
) -> Iterator[None]:
    """Let each module compute in fp32, and with other weights, while it runs and no longer.

    So there is one module's fp32 copy at a time, not the model's. Its own storage comes back, so
    bits, ties and views are what they were.

    Args:
        model: left as it is when the context ends, also by an error.
        weights: module name → what gives the parameters it shall compute with.
    """
    handles = []
    running: list[_Widened] = []

    def enter(module: nn.Module, _: Any, name: str) -> None:
        running.append(_Widened(module, weights.get(name)))

    def leave(*_: Any) -> None:
        running.pop().restore()

    for name, module in model.named_modules():
        if name in weights or any(t.dtype in HALF for t in own_tensors(module)):
            handles.append(module.register_forward_pre_hook(partial(enter, name=name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            running.pop().restore()


class _Widened:
    """A module whose own tensors are in fp32 and replaced, until `restore`."""

    def __init__(self, module: nn.Module, weights: Weights | None) -> None:
        self.module = module
        self.own = [(t, t.data) for t in own_tensors(module) if t.dtype in HALF]
        for tensor, data in self.own:
            tensor.data = data.float()
        self.parameters = dict(module._parameters)
        if weights is not None:
            module._parameters.update(weights(module))  # type: ignore[arg-type]

    def restore(self) -> None:
        self.module._parameters.update(self.parameters)
        for tensor, data in self.own:
            tensor.data = data
