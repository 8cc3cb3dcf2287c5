"""Compile an export for Qualcomm's HTP, and know a context that fits it still."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.manifest import (
    CONTEXT,
    CONTEXT_BINARY,
    MANIFEST,
    QDQ,
    added_files,
    entry,
    read_manifest,
    trusted,
    write_manifest,
)
from ..errors import CompileError
from .htp import Outcome, Target, compile_apart
from .lowering import complaint


@dataclass(frozen=True)
class HtpContext:
    """A model compiled for the HTP.

    Attributes:
        file: the ONNX file that wraps the compiled context; the context lies beside it.
        target: what it was compiled for.
        seconds: time of the compiler.
        operations: number of operations, all of them on the HTP.
        bytes: size of the compiled context.
    """

    file: Path
    target: Target
    seconds: float
    operations: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.operations} of {self.operations} operations on {self.target}, "
            f"compiled in {self.seconds:.1f} s, {self.bytes / 1e6:.1f} MB"
        )


def compile_for_htp(
    folder: str | Path, *, htp_arch: str = "73", soc_model: int | None = None
) -> HtpContext:
    """Compile an export for Qualcomm's HTP, whole, into a context binary beside it.

    `model_ctx.onnx` and `model_ctx_qnn.bin` appear in the folder together with their hashes in
    the manifest, or the folder stays as it was. The compiler runs in a process of its own.

    Args:
        folder: what `export` returned.
        htp_arch: version of the HTP: "68", "69", "73" (Snapdragon 8 Gen 2), "75", "79" or "81".
        soc_model: Qualcomm's number of the chip, e.g. 43 (SM8550); where it disagrees with
            `htp_arch` the compiler follows the chip. None for any chip with this HTP.

    Returns:
        Where the context is, and what the compiler said of it.

    Raises:
        MissingRuntimeError: onnxruntime-qnn is not installed.
        CompileError: an operation does not lower, or the compiler failed or crashed.
        IntegrityError: a file is not what the manifest says, or points outside the folder.
        DataError: not the folder of an export, or no such architecture.
    """
    target, folder = Target(htp_arch, soc_model), Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    source = trusted(folder / QDQ)
    with added_files(folder) as scratch:
        outcome = compiled(source, target, scratch)
        files = {name: entry(scratch / name) for name in (CONTEXT, CONTEXT_BINARY)}
    operations = len(outcome.operations)
    manifest["files"] |= files
    manifest["htp"] = {
        "htp_arch": htp_arch,
        "soc_model": soc_model,
        "source": manifest["files"][QDQ]["sha256"],
        "seconds": outcome.seconds,
        "operations": operations,
    }
    write_manifest(folder, manifest)
    size = files[CONTEXT_BINARY]["bytes"]
    return HtpContext(folder / CONTEXT, target, outcome.seconds or 0.0, operations, size)


def compiled(source: Path, target: Target, folder: Path) -> Outcome:
    """Compile a QDQ file into a context binary in a folder.

    Raises:
        CompileError: an operation does not lower, or the compiler failed or left nothing.
    """
    outcome = compile_apart(source, target, folder / CONTEXT)
    if outcome.error:
        raise CompileError(complaint(source, target, outcome))
    if not (folder / CONTEXT_BINARY).is_file():
        raise CompileError(
            f"{source.name} compiled for {target} without leaving a context: "
            f"{len(outcome.operations)} operations. Is it an ONNX file of this package?"
        )
    return outcome


def current_context(file: Path, target: Target) -> dict[str, Any] | None:
    """What the manifest says of the compiled context, when it is of this file for this target."""
    folder = file.parent
    if file.name != QDQ or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    made = manifest.get("htp")
    if not made or made["htp_arch"] != target.htp_arch:
        return None
    if target.soc_model not in (None, made["soc_model"]):
        return None
    return made if made["source"] == manifest["files"][QDQ]["sha256"] else None
