"""Which modules share memory: one parameter in two modules, one storage, a view of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..models.widening import own_tensors
from ..sim.trace import Trace


class Holder(NamedTuple):
    """Something that holds bytes `begin` … `end` − 1 of a storage.

    Attributes:
        begin: first byte.
        end: byte behind the last.
        module: name of the module that holds them; None for a function that reads them.
        what: "tied to" a module or "also read by" a function, with its name.
    """

    begin: int
    end: int
    module: str | None
    what: str


class Sharing:
    """Who holds the bytes of a model's parameters, before or after a copy made of it.

    Args:
        model: the model.
        traces: recordings; a function that reads a tensor which no operation made holds it.
    """

    def __init__(self, model: nn.Module, traces: Iterable[Trace]) -> None:
        self.holders: dict[int, list[Holder]] = {}
        for name, module in model.named_modules():
            for tensor in own_tensors(module):
                self._add(tensor, name, f"tied to {name}")
        for trace in traces:
            for tensor, function in trace.constants:
                self._add(tensor, None, f"also read by {function}()")

    def _add(self, tensor: Tensor, module: str | None, what: str) -> None:
        if tensor.numel() and not tensor.is_meta:
            storage, begin, end = _span(tensor)
            self.holders.setdefault(storage, []).append(Holder(begin, end, module, what))

    def others(self, name: str, module: nn.Module) -> str | None:
        """With what else a module's parameters share memory, in words; None if with nothing."""
        found = [holder.what for holder in self._holders_of(module) if holder.module != name]
        return ", ".join(dict.fromkeys(found)) or None

    def read_by_function(self, module: nn.Module) -> bool:
        """Whether a function reads a parameter of a module."""
        return any(holder.module is None for holder in self._holders_of(module))

    def _holders_of(self, module: nn.Module) -> Iterator[Holder]:
        """Everything that holds bytes of a module's parameters, the module itself included."""
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and not parameter.is_meta:
                storage, begin, end = _span(parameter)
                for holder in self.holders.get(storage, []):
                    if holder.begin < end and begin < holder.end:
                        yield holder


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Address of a tensor's storage, and the bytes of it between its first and last element."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    last = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), begin, begin + (last + 1) * size
