"""Hashes of what a result depends on: it is current while they are what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aimet_quadapter

from .experiment import RunSpec
from .record import PACKAGES
from .sims import PER_TENSOR

AFTER = ("artifacts", "exporting", "device", "results", "cli", "integrations")
"""Packages of aimet_quadapter that come after a measurement: no number depends on them."""


def of_result(run: RunSpec, device: str, model_sha256: str, data_sha256: Mapping[str, str]) -> str:
    """Hash of all that the result of a run depends on."""
    settings = run.settings
    stated = [run.methods, run.finetune_texts, run.seed, settings, device]
    made_with: list[Any] = [model_sha256, data_sha256, sources_sha256()]
    made_with += [version(p) for p in PACKAGES]
    if Path(settings["config_file"]).is_file():
        made_with += [Path(settings["config_file"]).read_text(encoding="utf-8")]
    text = json.dumps([stated, made_with], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_pairs(run: RunSpec, model_sha256: str) -> str:
    """Name for the pairs that phase 1 of these settings, this seed and model finished."""
    settings = run.settings
    stated = [run.seed, model_sha256, settings["calibration"], settings["phase1"]]
    text = json.dumps([stated, sources_sha256()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def sources_sha256() -> str:
    """Hash of the code and files that a measurement depends on: this library, the package."""
    package = Path(aimet_quadapter.__file__).parent
    files = [PER_TENSOR, *Path(__file__).parent.rglob("*.py")]
    files += [f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in AFTER]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
