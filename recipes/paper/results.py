"""Results on disk: one JSON file a run, stamped with what made it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .measure import Runner
from .record import git_state, versions
from .settings import ExperimentError

CODE = ("--", "recipes", "aimet_quadapter")
"""What makes a result "dirty" when it is not committed."""


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """File → result, of all that lie in a folder."""
    files = folder.rglob("*_seed*.json")
    return {file: json.loads(file.read_text(encoding="utf-8")) for file in files}


def is_current(result: Mapping[str, Any] | None, file: Path, runner: Runner) -> bool:
    """Whether the result in the file of a run, None without one, is of the run's inputs.

    Raises:
        ExperimentError: it is of another model or of other texts, and would be lost.
    """
    if result is None:
        return False
    for key, ours in (("model_sha256", runner.model.hash), ("data_sha256", runner.data.sha256)):
        if result["stamp"][key] != ours:
            what = {"model_sha256": "another model", "data_sha256": "other texts"}[key]
            raise ExperimentError(
                f"{file} was measured with {what}: name another folder (--results) or remove it."
            )
    return bool(result["stamp"]["inputs"] == runner.inputs)


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    result = {key: value for key, value in result.items() if value not in (None, {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)


def stamp(runner: Runner) -> dict[str, Any]:
    """What made a result."""
    gpu = torch.cuda.get_device_name() if runner.args.device.startswith("cuda") else None
    return {
        "inputs": runner.inputs,
        "versions": versions(),
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "git": git_state(*CODE),
        "model_sha256": runner.model.hash,
        "data_sha256": runner.data.sha256,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
