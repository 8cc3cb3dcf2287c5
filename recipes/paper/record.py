"""What a measurement notes beside its numbers: peak memory, versions."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version

import torch

PACKAGES = ("aimet-torch", "torch", "transformers", "datasets", "numpy", "aimet_quadapter")


def peak_memory(device: str = "cpu") -> float:
    """Largest memory of the GPU, or resident size of this process so far, GiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Package → its version, and Python's."""
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}
