"""What a measurement notes beside its numbers: peak memory, versions."""

from __future__ import annotations

import platform
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from aimet_quadapter.progress import Clock

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("aimet-torch", "torch", "transformers", "datasets", "numpy", "aimet_quadapter")


def peak_memory(device: str = "cpu") -> float:
    """Largest memory of the GPU, or resident size of this process so far, GiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Package → its version, and Python's."""
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}


def git_state(*code: str) -> dict[str, Any]:
    """The commit, and whether these files and folders differ from it."""

    def output(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return {
        "commit": output("rev-parse", "HEAD"),
        "dirty": bool(output("status", "--porcelain", *code)),
    }


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
