"""The short set of benchmarks beside what is committed: `make bench`, at most ten minutes.

    python benchmarks/short.py

A ratio of two things measured in one run is worth comparing between machines; so that is what each
line has, then and now. Nothing is written to the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Short:
    """A benchmark, quickly.

    Attributes:
        program: in this folder, and what it is given; "{output}" is a folder that is empty.
        result: what it writes there.
        committed: the same in the results.
        figures: name → what takes it out of a result; None where a result has none.
    """

    program: Sequence[str]
    result: str
    committed: str
    figures: dict[str, Callable[[dict[str, Any]], float]]


def cost_of(method: str, key: str = "cpu_seconds") -> Callable[[dict[str, Any]], float]:
    """A method's time or memory over that of Quadapter's default tier."""
    return lambda r: r["summary"][method][f"{key} over quadapter default"]["median"]


def lost_by(method: str) -> Callable[[dict[str, Any]], float]:
    """A method's perplexity over the unquantized model's."""
    return lambda r: r["summary"][method]["perplexity"] / r["summary"]["fp"]["perplexity"]


def step(result: dict[str, Any], case: str) -> float:
    """A step's seconds over those of one that trains the unquantized weights."""
    return result["ratio to training"][case]["median"]


def estimated(result: dict[str, Any]) -> float:
    """A run's seconds, estimated over taken."""
    expected = result["estimated"]["seconds"]
    return sum(expected.values()) / sum(result["seconds"][stage] for stage in expected)


W8A8 = ("fp", "smoothquant", "quadapter fast", "quadapter default")
W4A16 = ("fp", "quadapter default", "seqmse")
PEERS = ("peers.py", "--turns", "1", "--output", "{output}")
SHORT = (
    Short(
        (*PEERS, "--methods", *W8A8),
        "embedded_w8a8.json",
        "peers/embedded_w8a8.json",
        {
            **{f"W8A8 seconds, {m} over quadapter default": cost_of(m) for m in W8A8[1:3]},
            **{f"W8A8 perplexity, {m} over fp": lost_by(m) for m in W8A8[1:]},
        },
    ),
    Short(
        (*PEERS, "--bits", "4", "16", "--methods", *W4A16),
        "embedded_w4a16.json",
        "peers/embedded_w4a16.json",
        {
            "W4A16 seconds, seqmse over quadapter default": cost_of("seqmse"),
            "W4A16 memory, seqmse over quadapter default": cost_of("seqmse", "peak_bytes"),
            **{f"W4A16 perplexity, {m} over fp": lost_by(m) for m in W4A16[1:]},
        },
    ),
    Short(
        ("phase2.py", "--turns", "2", "--output", "{output}/phase2.json"),
        "phase2.json",
        "cost/phase2_gpt2.json",
        {"a step of phase 2 over one of training": lambda r: step(r, "finetune")},
    ),
    Short(
        ("tiers.py", "fast", "--cpu-time", "--results", "{output}"),
        "fast.json",
        "tiers/fast.json",
        {"seconds of a run, estimated over taken": estimated},
    ),
)


def main() -> None:
    """Run them, and say what each figure was and is."""
    begin = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    print(f"{'':<52}{'committed':>12}{'now':>10}{'now over committed':>20}")
    for short in SHORT:
        with tempfile.TemporaryDirectory() as folder:
            given = [word.format(output=folder) for word in short.program]
            command = [sys.executable, str(ROOT / "benchmarks" / given[0]), *given[1:]]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            now = read(Path(folder) / short.result)
        then = read(RESULTS / short.committed)
        for name, figure in short.figures.items():
            was, is_now = figure(then), figure(now)
            print(f"{name:<52}{was:>12.3f}{is_now:>10.3f}{is_now / was:>20.2f}", flush=True)
    print(f"{time.monotonic() - begin:.0f} s")


def read(file: Path) -> dict[str, Any]:
    """A result."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
