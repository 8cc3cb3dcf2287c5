"""What is written when a command fails for a reason that is ours: a report, not a traceback."""

from __future__ import annotations

import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__

PACKAGES = ("aimet-torch", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-qnn")

NAME = "quadapter-crash.txt"
"""Of the report, in the working directory, or where that cannot be written in one of its own."""


def write_report(argv: Sequence[str], error: BaseException) -> Path:
    """Write what somebody needs who is to mend it.

    Args:
        argv: arguments of the command.
        error: what it raised.

    Returns:
        The file.
    """
    lines = [
        f"quadapter {shlex.join(argv)}",
        f"aimet_quadapter {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    text = "\n".join(line.rstrip("\n") for line in lines) + "\n"
    try:
        file = Path.cwd() / NAME
        file.write_text(text, encoding="utf-8")
    except OSError:
        file = Path(tempfile.mkdtemp()) / NAME
        file.write_text(text, encoding="utf-8")
    return file


def say(argv: Sequence[str], error: BaseException) -> None:
    """Write the report and say where it is, on standard error."""
    file = write_report(argv, error)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    print(f"quadapter: crashed: {reason} (an error of ours; {file} says more)", file=sys.stderr)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
