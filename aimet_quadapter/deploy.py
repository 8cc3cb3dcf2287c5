"""Run an exported model: on the CPU, and on Qualcomm's HTP backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError
from .exported import QDQ

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDER = "QNNExecutionProvider"

DTYPES: dict[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
}
"""ONNX Runtime's name of a type → numpy's."""

INSTALL = "pip install 'aimet_quadapter[deploy]'"


def run_on_cpu(path: str | Path, inputs: Any) -> np.ndarray:
    """Compute the logits of a QDQ file operation by operation, as it is written.

    Graph optimisations are off: with them ONNX Runtime's 8-bit kernels saturate on CPUs without
    VNNI, and the result is no longer the sim's.

    Args:
        path: the folder that `export` wrote, or a QDQ file.
        inputs: name → tensor or array; or one, or several in the order of the file's inputs.

    Returns:
        The logits, float32 (B, T, V).

    Raises:
        ImportError: onnxruntime is not installed.
        DataError: there is no such file, or the inputs are not the file's.
    """
    ort = _onnxruntime("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(_file(path), options, providers=["CPUExecutionProvider"])
    return _run(session, inputs)


def run_on_htp(path: str | Path, inputs: Any, *, htp_arch: str = "73") -> np.ndarray:
    """Compile a QDQ file for Qualcomm's HTP and run it, without any help from the CPU.

    On an x86 machine this is Qualcomm's emulation of the HTP: the same numbers, not the speed.

    Args:
        path: the folder that `export` wrote, or a QDQ file; of fixed shapes.
        inputs: as in `run_on_cpu`.
        htp_arch: version of the HTP, e.g. "73" (Snapdragon 8 Gen 2), "75", "79", "81".

    Returns:
        The logits, float32 (B, T, V).

    Raises:
        ImportError: onnxruntime-qnn is not installed.
        DataError: there is no such file, or the inputs are not the file's.
        Exception: ONNX Runtime's own, when an operation cannot run on the HTP.
    """
    ort = _onnxruntime("onnxruntime")
    qnn = _onnxruntime("onnxruntime_qnn")
    file = _file(path)
    if not _devices(ort):
        ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    options = ort.SessionOptions()
    # Without this ONNX Runtime computes on the CPU what the HTP refuses, and says nothing.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(
        _devices(ort)[:1], {"backend_path": qnn.get_qnn_htp_path(), "htp_arch": htp_arch}
    )
    return _run(ort.InferenceSession(file, options), inputs)


def _onnxruntime(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as e:
        package = name.replace("_", "-")
        raise ImportError(f"{package} is needed to run an exported model: {INSTALL}.") from e


def _devices(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]


def _file(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / QDQ
    if not file.is_file():
        raise DataError(f"there is no {file}: pass the folder that export(sim, ...) wrote.")
    return file


def _run(session: InferenceSession, inputs: Any) -> np.ndarray:
    wanted = session.get_inputs()
    described = ", ".join(f"{x.name} {x.shape} {x.type}" for x in wanted)
    if not isinstance(inputs, Mapping):
        several = inputs if isinstance(inputs, Sequence) else (inputs,)
        if len(several) != len(wanted):
            raise DataError(f"{len(several)} inputs given, the file takes {described}.")
        inputs = dict(zip((x.name for x in wanted), several, strict=True))
    if set(inputs) != {x.name for x in wanted}:
        raise DataError(f"inputs are {sorted(inputs)}, the file takes {described}.")
    feeds = {x.name: _array(inputs[x.name], DTYPES[x.type]) for x in wanted}
    for x in wanted:
        if list(feeds[x.name].shape) != x.shape:
            raise DataError(
                f"{x.name} has shape {list(feeds[x.name].shape)}, the file takes {described}. "
                "Export again with a dummy_input of this shape."
            )
    return session.run(["logits"], feeds)[0]


def _array(value: Any, dtype: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a GPU
        value = value.detach().cpu()
    return np.asarray(value, dtype=dtype)
