"""What `quadapter run` says: on what it works, with which versions, what comes next."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .estimate import Estimate, beside
from .loading import Subject
from .settings import Settings

QAIRT_OPSET = 22
"""Highest ONNX opset that the converter of QAIRT 2.39 reads, as its documentation says."""


def next_steps(folder: Path, opset: int) -> str:
    """The commands that take an export on towards a device, each on a line."""
    own = shlex.quote(str(folder))
    model, encodings = (shlex.quote(str(folder / f"model.{end}")) for end in ("onnx", "encodings"))
    command = (
        f"qairt-converter --input_network {model} --quantization_overrides {encodings} "
        "--output_path model.dlc"
    )
    if opset > QAIRT_OPSET:
        command += f"  (QAIRT 2.39 reads opset {QAIRT_OPSET}, this is {opset}: run --opset 22)"
    lines = [f"quadapter verify {own}", f"quadapter compile {own}", command]
    return "\n".join(f"next: {line}" for line in lines)


def to_generate(folder: Path) -> str:
    """The command that runs the graphs of generation."""
    return f"next: quadapter generate {shlex.quote(str(folder))} 'Once upon a time'"


def what_it_took(seconds: Mapping[str, float], estimate: Estimate | None) -> str:
    """The time of each stage, beside its estimate where there is one."""
    if estimate:
        return f"\n{beside(estimate.seconds, seconds)}"
    return ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())


def headline(settings: Settings, subject: Subject) -> str:
    """What is printed before the work."""
    return "\n".join(
        [
            " · ".join(f"{name} {number}" for name, number in run_versions().items()),
            *what_is_run(settings, subject),
        ]
    )


def what_is_run(settings: Settings, subject: Subject) -> list[str]:
    """What is run: a word, and what it is."""
    model, parameters = subject.model, sum(p.numel() for p in subject.model.parameters()) / 1e6
    weights, activations = settings.bits
    residual = f", residual stream A{settings.residual_bits}" if settings.residual_bits else ""
    first = subject.begins_with
    return [
        f"model        {settings.model}: {model.hf_class}, {parameters:.1f} M parameters",
        f"quantizers   W{weights}A{activations}{residual}, AIMET config {settings.config_file}",
        f"calibration  {settings.samples} × {subject.length} tokens, tier {settings.tier}, "
        f"seed {settings.seed}",
        f"evaluation   {settings.eval_tokens} tokens of each text, windows of {subject.window}"
        + (f"; all begin with {subject.tokenizer.decode(first)}" if first else ""),
    ]


def no_path(value: Any) -> Any:
    """A setting that names a file or folder of this machine → its name; others as they are."""
    if isinstance(value, list):
        return [no_path(x) for x in value]
    if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value


def run_versions() -> dict[str, str]:
    """Those of an export, and Python's."""
    from ..artifacts.manifest import versions

    return {**versions(), "python": platform.python_version()}
