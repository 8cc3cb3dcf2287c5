"""ONNX Runtime and Qualcomm's HTP: sessions, and the compiler in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingRuntimeError

PROVIDER = "QNNExecutionProvider"
INSTALL = "pip install 'aimet_quadapter[deploy]'"

HTP_ARCHES = ("68", "69", "73", "75", "79", "81")
"""Versions of the HTP that the provider knows; it takes any other word for the oldest one."""

NO_FALLBACK = "fallback to CPU EP has been explicitly disabled"
"""In ONNX Runtime's error when the provider does not take every node."""

QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        htp_arch: version of the HTP, one of `HTP_ARCHES`.
        soc_model: Qualcomm's number of the chip, e.g. 43 (SM8550), 57 (SM8650); None for any
            chip with this HTP. Where the two disagree, the compiler follows the chip.
    """

    htp_arch: str = "73"
    soc_model: int | None = None

    def __post_init__(self) -> None:
        if self.htp_arch not in HTP_ARCHES:
            raise DataError(
                f"htp_arch is {self.htp_arch!r}, possible are {', '.join(HTP_ARCHES)}: the "
                "compiler would silently build for its oldest. Take your chip's Hexagon version."
            )
        if self.soc_model is not None and not (
            isinstance(self.soc_model, int) and self.soc_model > 0
        ):
            raise DataError(
                f"soc_model is {self.soc_model!r}: pass Qualcomm's number of the chip, e.g. 43 "
                "for SM8550, or None."
            )

    def options(self) -> dict[str, str]:
        """The provider's options."""
        chosen = {"backend_path": runtime("onnxruntime_qnn").get_qnn_htp_path()}
        chosen["htp_arch"] = self.htp_arch
        if self.soc_model is not None:
            chosen["soc_model"] = str(self.soc_model)
        return chosen

    def __str__(self) -> str:
        return f"HTP v{self.htp_arch}" + (f", SoC {self.soc_model}" if self.soc_model else "")


@dataclass(frozen=True)
class Outcome:
    """How a compilation in its own process ended.

    Attributes:
        seconds: time of the compiler, None when it did not end well.
        nodes: (provider, type, name) of each node, in no order; () when it did not end well.
        error: what the compiler said, or which signal ended it; None when it ended well.
        log: what it wrote on the way.
    """

    seconds: float | None
    nodes: tuple[tuple[str, str, str], ...]
    error: str | None
    log: str

    @property
    def operations(self) -> list[tuple[str, str, str]]:
        """The nodes that compute: all but the quantizers."""
        return [node for node in self.nodes if node[1] not in QUANTIZERS]


def runtime(name: str) -> Any:
    """Import onnxruntime or onnxruntime_qnn.

    Raises:
        MissingRuntimeError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as e:
        package = name.replace("_", "-")
        raise MissingRuntimeError(
            f"{package} is needed to run an exported model: {INSTALL}."
        ) from e


def htp_session(
    file: Path, target: Target, *, fallback: bool = False, entries: dict[str, str] | None = None
) -> Any:
    """An ONNX Runtime session on the HTP.

    Args:
        file: an ONNX file, or a compiled context.
        target: what to compile for.
        fallback: leave on the CPU what does not lower. Without it that is an error; ONNX Runtime
            would compute it on the CPU and say nothing.
        entries: more of ONNX Runtime's session configuration.
    """
    ort, options = runtime("onnxruntime"), target.options()
    if not _devices(ort):
        ort.register_execution_provider_library(
            PROVIDER, runtime("onnxruntime_qnn").get_library_path()
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 0 if fallback else 3
    if not fallback:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in (entries or {}).items():
        settings.add_session_config_entry(key, value)
    # By default the provider leaves the last DequantizeLinear to the CPU if there may be one.
    options["offload_graph_io_quantization"] = "0"
    settings.add_provider_for_devices(_devices(ort)[:1], options)
    return ort.InferenceSession(file, settings)


def _devices(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]


def compile_apart(
    source: Path, target: Target, context: Path | None = None, *, fallback: bool = False
) -> Outcome:
    """Compile in a process of its own, which may crash without taking this one along.

    Args:
        source: an ONNX file, already trusted.
        target: what to compile for.
        context: where to write the compiled context; its binary lands beside it.
        fallback: compile what lowers and leave the rest to the CPU, with a verbose log.
    """
    runtime("onnxruntime")
    runtime("onnxruntime_qnn")
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        task = {
            "source": str(source.resolve()),
            "context": context and str(context.resolve()),
            "target": [target.htp_arch, target.soc_model],
            "fallback": fallback,
            "result": str(result),
        }
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # -P: a module in the current folder, which may be the export's, is not imported.
        command = [sys.executable, "-P", "-m", f"{__package__}.htp", json.dumps(task)]
        with log.open("wb") as stream:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, env=environment, check=False
            ).returncode
        said = log.read_text(encoding="utf-8", errors="replace")
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            nodes = tuple((p, t, n) for p, t, n in found["nodes"])
            return Outcome(found["seconds"], nodes, found["error"], said)
    return Outcome(None, (), _ending(code, said), said)


def _ending(code: int, log: str) -> str:
    if code < 0:
        return f"the compiler crashed ({signal.Signals(-code).name})"
    return f"the compiler ended with code {code}: {(log.strip().splitlines() or ['nothing'])[-1]}"


def _compile(task: dict[str, Any]) -> dict[str, Any]:
    """What runs in the other process."""
    entries = {"session.record_ep_graph_assignment_info": "1"}
    if task["context"]:
        entries |= {
            "ep.context_enable": "1",
            "ep.context_file_path": task["context"],
            "ep.context_embed_mode": "0",
        }
    runtime("onnxruntime")
    runtime("onnxruntime_qnn")
    source = Path(task["source"])
    os.chdir(source.parent)  # the path of the model, as given, goes into names in the context
    start = time.perf_counter()
    try:
        session = htp_session(
            Path(source.name),
            Target(*task["target"]),
            fallback=task["fallback"],
            entries=entries,
        )
    except Exception as e:
        if not type(e).__module__.startswith("onnxruntime"):
            raise
        error = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(e)).strip()
        return {"seconds": None, "nodes": [], "error": error}
    seconds = time.perf_counter() - start
    nodes = [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return {"seconds": round(seconds, 2), "nodes": nodes, "error": None}


if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    Path(_task["result"]).write_text(json.dumps(_compile(_task)), encoding="utf-8")
