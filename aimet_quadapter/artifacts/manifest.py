"""The folder of an export: its files, their hashes, and what must hold before one is opened."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from .. import __version__
from ..errors import DataError, IntegrityError

FORMAT = "aimet_quadapter.export/1"
"""Written into the manifest; changes when a reader of the old files would misread the new."""

MODEL = "model.onnx"
ENCODINGS = "model.encodings"
QDQ = "model_qdq.onnx"
REFERENCE = "reference.safetensors"
CONTEXT = "model_ctx.onnx"
CONTEXT_BINARY = "model_ctx_qnn.bin"
MANIFEST = "manifest.json"

GENERATION = "generation"
"""Kind, in the manifest, of a folder that `export_generation` wrote."""

PROMPT = "prompt_qdq.onnx"
DECODE = "decode_qdq.onnx"
WEIGHTS = "weights.bin"
"""Both graphs' weights: ONNX external data that both files point into."""

PACKAGES = ("aimet-torch", "torch", "transformers", "onnx")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: pass a folder that export(sim, ...) wrote.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{file} is not JSON ({e}): export again.") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{file} has format {found!r}, this version reads {FORMAT!r}.")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put a manifest into the folder, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as stream:
        stream.write(json.dumps(manifest, indent=2) + "\n")
    Path(stream.name).chmod(0o644)
    Path(stream.name).replace(folder / MANIFEST)


def changed_files(
    folder: Path, manifest: dict[str, Any], only: set[str] | None = None
) -> list[str]:
    """Files of the manifest, or those of them named, that are missing, changed or elsewhere."""
    return [
        name
        for name, entry in manifest["files"].items()
        if (only is None or name in only)
        and (
            not _inside(folder, name)
            or not (folder / name).is_file()
            or sha256(folder / name) != entry["sha256"]
        )
    ]


def trusted(file: Path) -> Path:
    """An ONNX file that may be opened: unchanged since its export, and so is all it points to.

    Beside a manifest, the file and the files it names for weights or a compiled context must be
    in the manifest with the hash they have. Without one, only the second half is checked: what it
    names must lie in its folder. ONNX Runtime and `onnx.load` would follow the names.

    Returns:
        The same path.

    Raises:
        DataError: there is no such file, or it is not ONNX.
        IntegrityError: a file is changed, unknown to the manifest, or outside the folder.
    """
    if not file.is_file():
        raise DataError(f"there is no {file}: pass a folder that export(sim, ...) wrote.")
    folder, names = file.parent, {file.name}
    if (folder / MANIFEST).is_file():
        check_listed(folder, names)
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as e:
        if type(e).__name__ != "DecodeError":
            raise
        raise DataError(f"{file} is not an ONNX file: {e}.") from e
    for name in sorted(set(named_files(model))):
        if not _inside(folder, name):
            raise IntegrityError(
                f"{file} points to {name!r}, outside its folder: it is not opened, for whoever "
                "made it would choose which file of this machine is read. Export again."
            )
        names.add(Path(name).as_posix())
    if (folder / MANIFEST).is_file():
        check_listed(folder, names - {file.name})
    return file


def check_listed(folder: Path, names: set[str]) -> None:
    """Raise IntegrityError unless the files named are in the manifest and have its hashes."""
    manifest = read_manifest(folder)
    unknown = sorted(names - set(manifest["files"]))
    changed = [*changed_files(folder, manifest, names), *unknown]
    if changed:
        raise IntegrityError(
            f"{', '.join(changed)} in {folder} changed since the export ({MANIFEST} has other "
            "hashes): it is not opened. Export again, or fetch the folder again."
        )


def _inside(folder: Path, name: str) -> bool:
    """Whether a name given in a file stays in the folder, links followed."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


def named_files(message: Any) -> Iterator[str]:
    """External data and compiled contexts that an ONNX model names, wherever it does."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in message.external_data}
            yield entries.get("location", "")
        return
    if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
        attributes = {a.name: a for a in message.attribute}
        if "embed_mode" in attributes and not attributes["embed_mode"].i:
            cache = attributes.get("ep_cache_context")
            yield cache.s.decode(errors="replace") if cache else ""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                yield from named_files(one)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file: its SHA-256 and size."""
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """File in the folder → its SHA-256 and size."""
    return {name: entry(folder / name) for name in _files(folder)}


def versions() -> dict[str, str]:
    """Versions of this package and of those an export depends on."""
    return {"aimet_quadapter": __version__, **{name: version(name) for name in PACKAGES}}


def describe_input(name: str, x: Any) -> dict[str, Any]:
    """Name, shape and type of an input of the files."""
    return {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def bit_widths(sim: Any) -> dict[str, dict[str, int]]:
    """Kind of quantizer → "8 bits" or "8 bits per channel" → how many."""
    counts: dict[str, Counter[str]] = {}
    for _, module in sim.named_qmodules():
        kinds: list[tuple[str, Any]] = list(module.param_quantizers.items())
        kinds += [("input", q) for q in module.input_quantizers]
        kinds += [("output", q) for q in module.output_quantizers]
        for kind, quantizer in kinds:
            if quantizer is not None and quantizer.is_initialized():
                several = " per channel" if getattr(quantizer, "shape", ()) else ""
                label = f"{quantizer.bitwidth} bits{several}"
                counts.setdefault(kind, Counter())[label] += 1
    return {kind: dict(count) for kind, count in counts.items()}


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer that was exported with a model; None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError if an export into this folder would lose something."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: export needs a folder. Name another.")
    if not overwrite:
        raise FileExistsError(
            f"{target} is not empty: nothing is written over it. Name another folder, or say "
            "overwrite=True if it holds an earlier export."
        )
    foreign = _foreign_files(target)
    if foreign:
        raise FileExistsError(
            f"{target} holds more than an earlier export ({', '.join(foreign[:5])}): "
            "overwrite=True would delete that too. Name another folder, or move those files."
        )


def _foreign_files(target: Path) -> list[str]:
    """What lies in the folder and was not written by an export."""
    own = {MANIFEST}
    if (target / MANIFEST).is_file():
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            own = set()
        own |= set(manifest.get("files", ()))
    return [name for name in _files(target) if name not in own]


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when the context ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


@contextmanager
def added_files(folder: Path) -> Iterator[Path]:
    """A scratch folder; what it holds when the context ends without error moves into `folder`.

    Nothing of a failed attempt stays in `folder`. The manifest is the caller's to write.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)
