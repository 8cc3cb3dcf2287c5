"""Finished pieces of long work on disk: written at once or not at all, used where they fit."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2


def fingerprint(settings: Any, tensors: Iterable[Tensor]) -> str:
    """SHA-256 over plain settings and the bytes of tensors."""
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(str((tuple(data.shape), data.dtype)).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, name: str, mark: str, value: Tensor, record: dict[str, Any]) -> None:
    """Write a tensor, such as a pair's α, and what is known about it.

    An interruption leaves no half file.
    """
    save_all(folder, name, mark, {"value": value}, record)


def save_all(
    folder: Path, name: str, mark: str, tensors: Mapping[str, Tensor], record: dict[str, Any]
) -> None:
    """Write tensors by name, and what is known about them, as `save` does."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
    os.close(handle)
    metadata = {"fingerprint": mark, "name": name, "record": json.dumps(record)}
    try:
        kept = {k: x.detach().cpu().contiguous().clone() for k, x in tensors.items()}
        save_file(kept, temporary, metadata)
        Path(temporary).replace(path_of(folder, name))
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(folder: Path, name: str, mark: str) -> tuple[Tensor, dict[str, Any]] | None:
    """The tensor and its record, or None when there is none for just this fingerprint.

    A file that cannot be read, or that was made from other data, weights or settings, counts as
    none: the work is done again and the file replaced.
    """
    stored = load_all(folder, name)
    if stored is None or stored[0] != mark:
        return None
    return stored[1]["value"], stored[2]


def load_all(folder: Path, name: str) -> tuple[str, dict[str, Tensor], dict[str, Any]] | None:
    """The fingerprint, the tensors and the record, or None when no file can be read."""
    path = path_of(folder, name)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return metadata["fingerprint"], tensors, json.loads(metadata["record"])
    except (SafetensorError, json.JSONDecodeError, KeyError):
        return None


def path_of(folder: Path, name: str) -> Path:
    """The file of a name."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
