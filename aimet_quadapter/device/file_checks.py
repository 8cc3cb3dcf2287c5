"""The checks of `verify` on the files themselves: nothing is computed."""

from __future__ import annotations

from typing import Any

from ..artifacts.exported import check_export
from ..artifacts.manifest import CONTEXT, MODEL, QDQ, changed_files, trusted
from ..errors import IntegrityError
from .verify_report import VerifyReport


def check_files(report: VerifyReport, manifest: dict[str, Any]) -> bool:
    """Whether hashes are the manifest's and the ONNX files point to nothing outside.

    It comes first: when it returns False, nothing else may be opened.
    """
    changed = changed_files(report.folder, manifest)
    problem = f"changed since the export: {', '.join(changed)}" if changed else ""
    names = [n for n in (MODEL, QDQ, CONTEXT) if n in manifest["files"] and not changed]
    try:
        for name in names:
            trusted(report.folder / name)
    except IntegrityError as e:
        problem = str(e)
    good = f"{len(manifest['files'])} files have the hashes in the manifest"
    report.add("files", not problem, problem or good)
    if problem:
        report.add("everything else", None, "a file is not what was exported: nothing is opened")
    return not problem


def check_encodings(report: VerifyReport) -> None:
    """Every device operation has its encoding, every encoding its tensor."""
    found = check_export(report.folder)
    lacking = f"{len(found.missing)} lack theirs: {', '.join(found.missing[:5])}"
    good = f"all {found.operations[MODEL]} device operations have theirs, in both ONNX files"
    report.add("encodings", not found.missing, lacking if found.missing else good)
    unknown = f"not in {MODEL}: {', '.join(found.unknown[:5])}"
    good = f"each is a tensor of {MODEL}"
    report.add("names of encodings", not found.unknown, unknown if found.unknown else good)


def list_sizes(report: VerifyReport, manifest: dict[str, Any]) -> None:
    """Sizes of the files."""
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    report.numbers["bytes"] = sizes
    large = {n: b for n, b in sizes.items() if n.endswith((".onnx", ".bin", ".data")) and b > 1e5}
    listed = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in large.items())
    report.add("sizes", True, listed)
