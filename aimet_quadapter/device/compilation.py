"""Compile an export for Qualcomm's HTP, and know a context that fits it still."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..artifacts.manifest import (
    CONTEXT,
    CONTEXT_BINARY,
    MANIFEST,
    QDQ,
    REFERENCE,
    added_files,
    check_listed,
    entry,
    read_manifest,
    trusted,
    write_manifest,
)
from ..artifacts.reference import read_reference
from ..errors import CompileError
from .htp import Outcome, Target, compile_apart, htp_session
from .logit_differences import DEVIATION, share_of_range
from .lowering import complaint
from .weight_formats import doubtful_weights


@dataclass(frozen=True)
class HtpContext:
    """A model compiled for the HTP.

    Attributes:
        file: the ONNX file that wraps the compiled context; the context lies beside it.
        target: what it was compiled for.
        seconds: time of the compiler.
        operations: number of operations, all of them on the HTP.
        bytes: size of the compiled context.
        deviation: mean difference of its logits from the sim's on the folder's reference inputs,
            as a share of their range; None when they were not compared.
    """

    file: Path
    target: Target
    seconds: float
    operations: int
    bytes: int
    deviation: float | None

    def __str__(self) -> str:
        compared = (
            "not compared with the sim"
            if self.deviation is None
            else f"logits {self.deviation:.2%} of their range from the sim's"
        )
        return (
            f"{self.file}: {self.operations} of {self.operations} operations on {self.target}, "
            f"compiled in {self.seconds:.1f} s, {self.bytes / 1e6:.1f} MB, {compared}"
        )


def compile_for_htp(
    folder: str | Path, *, htp_arch: str = "73", soc_model: int | None = None, check: bool = True
) -> HtpContext:
    """Compile an export for Qualcomm's HTP, whole, into a context binary beside it.

    `model_ctx.onnx` and `model_ctx_qnn.bin` appear in the folder together with their hashes in
    the manifest, or the folder stays as it was. The compiler runs in a process of its own. What it
    made is run once on the folder's reference inputs: it may take a model and compute another one.

    Args:
        folder: what `export` returned.
        htp_arch: version of the HTP: "68", "69", "73" (Snapdragon 8 Gen 2), "75", "79" or "81".
        soc_model: Qualcomm's number of the chip, e.g. 43 (SM8550); where it disagrees with
            `htp_arch` the compiler follows the chip. None for any chip with this HTP.
        check: refuse a context whose logits are further from the sim's than the HTP's own
            arithmetic brings them, 3 % of their range on average. A folder without
            `reference.safetensors` is not checked.

    Returns:
        Where the context is, and what the compiler said of it.

    Raises:
        MissingRuntimeError: onnxruntime-qnn is not installed.
        CompileError: an operation does not lower, the compiler failed or crashed, or it made
            something else of the model.
        IntegrityError: a file is not what the manifest says, or points outside the folder.
        DataError: not the folder of an export, or no such architecture.
    """
    target, folder = Target(htp_arch, soc_model), Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    source = trusted(folder / QDQ)
    with added_files(folder) as scratch:
        outcome = compiled(source, target, scratch)
        context = scratch / CONTEXT
        deviation = deviation_of(htp_session(context, target), source, target) if check else None
        files = {name: entry(scratch / name) for name in (CONTEXT, CONTEXT_BINARY)}
    operations = len(outcome.operations)
    manifest["files"] |= files
    manifest["htp"] = {
        "htp_arch": htp_arch,
        "soc_model": soc_model,
        "source": manifest["files"][QDQ]["sha256"],
        "seconds": outcome.seconds,
        "operations": operations,
        "deviation": deviation,
    }
    write_manifest(folder, manifest)
    size = files[CONTEXT_BINARY]["bytes"]
    seconds = outcome.seconds or 0.0
    return HtpContext(folder / CONTEXT, target, seconds, operations, size, deviation)


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


def deviation_of(session: Any, source: Path, target: Target) -> float | None:
    """How far a compiled model is from the sim on the reference inputs that lie beside its file.

    Args:
        session: ONNX Runtime's, of what was compiled.
        source: the QDQ file that it was made from.
        target: what for.

    Returns:
        `share_of_range` of the logits; None when no reference lies beside the file.

    Raises:
        CompileError: it is above `DEVIATION`.
        IntegrityError: the reference is not what the manifest says.
    """
    folder = source.parent
    if source.name != QDQ or not (folder / MANIFEST).is_file():
        return None
    if REFERENCE not in read_manifest(folder)["files"]:
        return None
    check_listed(folder, {REFERENCE})
    reference = read_reference(folder)
    feeds = {name: x.numpy() for name, x in reference.inputs.items()}
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    share = share_of_range(reference.rows(logits), reference.sim)
    if share <= DEVIATION:
        return share
    lines = [
        f"{source.name} was compiled for {target} into something else: on the folder's reference "
        f"inputs its logits are off the sim's by {share:.1%} of their range on average, the HTP's "
        f"arithmetic alone stays below {DEVIATION:.1%}. verify(folder) says what the file computes "
        "on the CPU; check=False keeps it all the same.",
        *doubtful_weights(source),
    ]
    raise CompileError("\n".join(lines))


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
