"""What a measurement notes beside its numbers: wall time, peak memory, versions."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

PACKAGES = ("aimet-torch", "torch", "transformers", "datasets", "numpy", "aimet_quadapter")


class Clock:
    """Wall time by stage.

    Attributes:
        seconds: stage → seconds it took so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the context takes to a stage."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - begin


def peak_memory(device: str = "cpu") -> float:
    """Largest memory of the GPU, or resident size of this process so far, GiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Package → its version, and Python's."""
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}
