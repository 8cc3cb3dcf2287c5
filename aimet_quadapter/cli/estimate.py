"""What a run will take: time by stage, memory, disk; and whether the machine has that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .machine import free_disk, in_words

SMALLER = (
    "Make --samples or --length smaller, --calibration capture_bytes=… too, or leave the export "
    "out (--no-export); --no-preflight starts all the same."
)


@dataclass(frozen=True)
class Need:
    """Disk that a run needs.

    Attributes:
        folder: where.
        size: bytes that stay.
        passing: bytes that go away again.
        remedy: what to do where there is not so much.
    """

    folder: Path
    size: int
    passing: int
    remedy: str

    def __str__(self) -> str:
        sizes = [in_words(self.size)] if self.size else []
        sizes += [f"{in_words(self.passing)} for a while"] if self.passing else []
        return f"{' and '.join(sizes)} in {self.folder}; {in_words(free_disk(self.folder))} free"


@dataclass(frozen=True)
class Resumed:
    """What checkpoints of an interrupted run may spare.

    Attributes:
        what: what is there, in words; "" for nothing.
        seconds: stage → seconds that it may spare.
    """

    what: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        pairs: kind of pair → how many there are.
        seconds: stage → seconds.
        peak: largest memory of the process (of the GPU, where the model is on one), bytes.
        stage: when that is.
        used: bytes of it that are in use already.
        free: bytes that it could have besides.
        disk: what is needed of it.
        resumed: what of the time may be spared.
        took: seconds that the preflight took.
    """

    pairs: Mapping[str, int]
    seconds: Mapping[str, float]
    peak: int
    stage: str
    used: int
    free: int
    disk: tuple[Need, ...]
    resumed: Resumed
    took: float

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.pairs.items())
        stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in self.seconds.items())
        lines = [
            f"preflight    {self.took:.0f} s; {sum(self.pairs.values())} pairs: {kinds}",
            f"time         about {duration(self.total)}: {stages}",
            f"memory       about {in_words(self.peak)} ({self.stage}), of it "
            f"{in_words(self.used)} now; {in_words(self.free)} free",
        ]
        if self.resumed.what:
            less = duration(max(self.total - self.resumed.seconds, 0))
            lines[2:2] = [
                f"to resume    {self.resumed.what}: about {less} where they fit these settings"
            ]
        lines += [f"disk         {need}" for need in self.disk]
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse a run that the machine has not the memory or the disk for.

        Raises:
            DataError: it names what is needed and free, and what to make smaller.
        """
        if self.peak - self.used > self.free:
            raise DataError(
                f"the run needs about {in_words(self.peak - self.used)} more memory "
                f"({self.stage}) and {in_words(self.free)} are free. {SMALLER}"
            )
        for need in self.disk:
            free = free_disk(need.folder)
            if need.size + need.passing > free:
                raise DataError(
                    f"the run needs about {in_words(need.size + need.passing)} of disk in "
                    f"{need.folder} and {in_words(free)} are free. {need.remedy} (--no-preflight "
                    "starts all the same.)"
                )

    def record(self) -> dict[str, Any]:
        """As `result.json` has it."""
        return {
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "peak_bytes": self.peak,
            "disk_bytes": sum(need.size for need in self.disk),
            "may_be_resumed": self.resumed.what,
        }


def duration(seconds: float) -> str:
    """Seconds as they are printed."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def beside(estimated: Mapping[str, float], took: Mapping[str, float]) -> str:
    """Each stage, what was estimated and what it took."""
    lines = [f"{'stage':<32}{'estimated':>12}{'took':>10}"]
    for stage, value in took.items():
        known = f"{estimated[stage]:.1f} s" if stage in estimated else ""
        lines.append(f"{stage:<32}{known:>12}{value:>8.1f} s")
    return "\n".join(lines)
