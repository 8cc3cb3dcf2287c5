"""What a measurement notes beside its numbers: peak memory, versions."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from aimet_quadapter.progress import Clock

PACKAGES = ("aimet-torch", "torch", "transformers", "datasets", "numpy", "aimet_quadapter")


def peak_memory(device: str = "cpu") -> float:
    """Largest memory of the GPU, or resident size of this process so far, GiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Package → its version, and Python's."""
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}


class Stages(Clock):
    """Wall time and peak memory by stage.

    Attributes:
        peaks: stage → largest resident size while it ran, GiB. Where the system cannot forget an
            earlier peak (not Linux), the largest so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the context takes to a stage."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
        with super().timed(stage):
            yield
        self.peaks[stage] = max(self.peaks.get(stage, 0.0), peak_memory())
