"""What the machine has: memory, disk, and how much of its memory this process has used."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")

INTERVAL = 0.01
"""Seconds between two looks at the memory in use."""


class Memory:
    """The memory that a model works in: the GPU's, or that of the process.

    Args:
        device: torch's.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._seen = 0

    @property
    def used(self) -> int:
        """Bytes that this process has now."""
        if self.is_gpu:
            import torch

            return torch.cuda.memory_allocated(self.device)
        return _field(STATUS, "VmRSS")

    @property
    def most(self) -> int:
        """Bytes that it had at most so far."""
        if self.is_gpu:
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return max(_field(STATUS, "VmHWM"), self._seen)  # the kernel's own lags behind

    @property
    def free(self) -> int:
        """Bytes that it could have besides: free ones, what can be freed, within its cgroup."""
        if self.is_gpu:
            import torch

            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device) - self.used
        return min([_field(MEMORY, "MemAvailable"), *_left_in_groups()])

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        """See how much the context has at most."""
        peak, done = Peak(self.used), threading.Event()

        def look() -> None:
            while not done.wait(INTERVAL):
                peak.most = max(peak.most, self.used)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()
            peak.most = max(peak.most, self.used)
            self._seen = max(self._seen, peak.most)


class Peak:
    """What a context had at most.

    Attributes:
        before: bytes in use when it began.
        most: the largest number seen.
    """

    def __init__(self, before: int) -> None:
        self.before = before
        self.most = before

    @property
    def above(self) -> int:
        """Bytes that came on top."""
        return self.most - self.before


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 where there is nothing."""
    files = [place, *place.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def in_words(size: float) -> str:
    """A number of bytes as it is printed."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _field(file: Path, name: str) -> int:
    """A number of kB in one of the kernel's tables, in bytes."""
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


def _left_in_groups() -> Iterator[int]:
    """Bytes left in the cgroup of the process and in each above it that has a limit."""
    if not OWN_GROUP.is_file():
        return
    lines = OWN_GROUP.read_text(encoding="utf-8").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)  # version 2
    if own is None:
        return
    place = GROUPS / own.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(GROUPS):
            return
        limit = group / "memory.max"
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
            used = int((group / "memory.current").read_text(encoding="utf-8"))
            words = (group / "memory.stat").read_text(encoding="utf-8").split()
            cached = int(words[words.index("inactive_file") + 1])
            yield max(int(text) - used + cached, 0)
