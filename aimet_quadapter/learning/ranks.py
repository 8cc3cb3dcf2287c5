"""The processes of `torch.distributed`, one rank each: a part of the work for each, errors for all.

What they exchange is JSON, safetensors and gradients of small tensors, in a gloo group of their own
on the CPU. It waits as long as another one learns, where NCCL would give up after minutes, and
several ranks may share a GPU.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from .. import errors
from ..errors import DataError, QuadapterError
from ..progress import silent

PATIENCE = timedelta(days=30)
"""How long a rank waits for the others: one may learn for hours what takes another minutes."""

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; by default there is no other.

    Attributes:
        rank: its number.
        size: how many there are.
        group: of `torch.distributed`; None where there is no other.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that says and writes what one of them has to."""
        return self.rank == 0

    def gathered(self, own: bytes) -> list[bytes]:
        """What each rank gives, at least a byte, in their order."""
        if self.group is None:
            return [own]
        length = torch.tensor([len(own)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        sizes = [int(n) for n in lengths]
        sent = torch.frombuffer(bytearray(own.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        received = [torch.zeros_like(sent) for _ in sizes]
        dist.all_gather(received, sent, group=self.group)
        return [x[:n].numpy().tobytes() for x, n in zip(received, sizes, strict=True)]

    def told(self, own: Any) -> list[Any]:
        """The same of plain data."""
        return [json.loads(text) for text in self.gathered(json.dumps(own).encode())]

    def told_tensors(self, own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The same of tensors by name; they arrive on the CPU."""
        sent = save({name: tensor.cpu() for name, tensor in own.items()})
        return [load(received) for received in self.gathered(sent)]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Raise on every rank what is raised on one inside, so that none waits for it later.

        Each raises its own error; one that has none that of the first rank with one, as the same
        class where it is ours. Ctrl-C is not passed on: torchrun sends it to all.
        """
        try:
            yield
        except Exception as error:
            self.told(_described(error))
            raise
        for rank, described in enumerate(self.told(None)):
            if described is not None:
                raise _error(rank, *described)

    @contextmanager
    def entered(self, *contexts: AbstractContextManager[Any]) -> Iterator[None]:
        """Be in contexts that may fail to begin, for want of disk or memory: all ranks or none."""
        with ExitStack() as stack:
            with self.all_or_none():
                for context in contexts:
                    stack.enter_context(context)
            yield

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Compare what each rank works on.

        Args:
            facts: name → plain value.

        Raises:
            DataError: on every rank; it says what differs.
        """
        first, *others = self.told(dict(facts))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other.get(name) != value:
                    plain = not name.startswith("the ")
                    values = f" ({value!r} and {other.get(name)!r})" if plain else ""
                    raise DataError(
                        f"ranks 0 and {rank} differ in {name}{values}. They share the work: give "
                        "all the same model, quantizers, pairs, data and settings."
                    )

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give all ranks the mean of their gradients.

        A parameter that no rank has a gradient of has none then; one that some lack counts as zero
        there.
        """
        if self.group is None:
            return
        of_each = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([has, *(g.flatten().float().cpu() for g in of_each)])
        dist.all_reduce(flat, group=self.group)
        has, *means = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, some, mean in zip(parameters, has, means, strict=True):
            if some:
                parameter.grad = (mean / self.size).view_as(parameter).to(parameter)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if there were no other for a while, on what the others do not do."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of `torch.distributed`, where it is initialised; all of them have to come here.

    All but the first are silent about how far they are.
    """
    together = dist.is_available() and dist.is_initialized() and not _ALONE.get()
    size = dist.get_world_size() if together else 1
    if size == 1:
        yield Ranks()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size, group)
    try:
        if ranks.first:
            yield ranks
        else:
            with silent():
                yield ranks
    finally:
        dist.destroy_process_group(group)


def _described(error: Exception) -> tuple[str, str, str]:
    """Name of the class, what it says, and where it was raised."""
    name = "OSError" if isinstance(error, OSError) else type(error).__name__
    return name, str(error), "".join(traceback.format_exception(error))


def _error(rank: int, name: str, text: str, where: str) -> Exception:
    """The error of another rank."""
    kind = OSError if name == "OSError" else getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, QuadapterError | OSError):
        return kind(f"rank {rank}: {text}")
    return RuntimeError(f"rank {rank}: {name}: {text}\n{where}")
