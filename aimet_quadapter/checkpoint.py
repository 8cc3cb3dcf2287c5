"""Finished pieces of long work on disk: written at once or not at all, used where they fit."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
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
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
    os.close(handle)
    metadata = {"fingerprint": mark, "name": name, "record": json.dumps(record)}
    try:
        save_file({"value": value.detach().cpu().contiguous()}, temporary, metadata)
        Path(temporary).replace(_path(folder, name))
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(folder: Path, name: str, mark: str) -> tuple[Tensor, dict[str, Any]] | None:
    """The tensor and its record, or None when there is none for just this fingerprint.

    A file that cannot be read, or that was made from other data, weights or settings, counts as
    none: the work is done again and the file replaced.
    """
    path = _path(folder, name)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != mark:
                return None
            return file.get_tensor("value"), json.loads(metadata["record"])
    except (SafetensorError, json.JSONDecodeError):
        return None


def _path(folder: Path, name: str) -> Path:
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
