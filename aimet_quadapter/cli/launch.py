"""`quadapter run` on several ranks: torchrun starts them, the first one speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from ..learning.ranks import Ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process in its environment."""


@contextmanager
def launched(device: str | None) -> Iterator[Ranks]:
    """The processes that torchrun started, as ranks; without it this one alone.

    Each takes the GPU of its number, unless `device` names another or the CPU. All but the first
    print nothing.

    Args:
        device: as the setting has it.

    Raises:
        DataError: there are fewer GPUs than processes.
    """
    import torch.distributed as dist

    from ..learning.ranks import PATIENCE, joined

    known = all(name in os.environ for name in VARIABLES)
    if not known or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        with joined() as ranks:
            yield ranks
        return
    _take_gpu(device)
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        with joined() as ranks, Path(os.devnull).open("w") as nowhere:
            if ranks.first:
                yield ranks
            else:
                with redirect_stdout(nowhere):
                    yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Work that all ranks do or none: where one fails, the first says it and the others leave."""
    try:
        with ranks.all_or_none():
            yield
    except Exception:
        if ranks.first:
            raise
        raise SystemExit(0) from None


def _take_gpu(device: str | None) -> None:
    """Let "cuda" be the GPU of this process's number on its machine."""
    import torch

    if device not in (None, "cuda") or not torch.cuda.is_available():
        return
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise DataError(
            f"process {number} of this machine has no GPU of its own: there are {there}. Start as "
            "many as there are (--nproc-per-node), or let all share one (--device cuda:0)."
        )
    torch.cuda.set_device(number)
