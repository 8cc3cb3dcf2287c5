"""`benchmarks/peers.py`: methods in turn, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEW = ["--samples", "1", "--length", "64", "--eval-tokens", "128"]


def test_methods_take_turns_and_one_that_cannot_run_says_why(tmp_path: Path) -> None:
    methods = ["smoothquant", "spinquant", "quadapter default"]
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", *FEW, "--turns", "2"]
    command += ["--layers", "1", "--name", "one", "--output", tmp_path, "--methods", *methods]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "one_w8a8.json").read_text(encoding="utf-8"))
    assert "GPT2LMHeadModel" in result["does not run"]["spinquant"]
    assert [set(turn) for turn in result["turns"]] == 2 * [{*methods} - {"spinquant"}]
    first, second = (turn["smoothquant"] for turn in result["turns"])
    assert first["divergence"] == second["divergence"] > 0
    ratio = result["summary"]["smoothquant"]["cpu_seconds over quadapter default"]
    assert ratio["least"] <= ratio["median"] <= ratio["most"] < 1
