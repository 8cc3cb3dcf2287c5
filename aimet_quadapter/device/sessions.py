"""Run an exported model: on the CPU, and on Qualcomm's HTP backend."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifacts.manifest import CONTEXT, MANIFEST, QDQ, read_manifest, trusted
from ..errors import DataError
from ..evaluation.scores import perplexity
from ..sim.values import check_tensor
from .compilation import compiled, current_context, deviation_of
from .htp import Target, htp_session, runtime

DTYPES: dict[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
}
"""ONNX Runtime's name of a type → numpy's."""


class CpuSession:
    """A QDQ file on the CPU, operation by operation, as it is written.

    Graph optimisations are off: with them ONNX Runtime's 8-bit kernels saturate on CPUs without
    VNNI, and the result is no longer the sim's.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        path: the folder that `export` wrote, or an ONNX file of fixed shapes.

    Raises:
        MissingRuntimeError: onnxruntime is not installed.
        DataError: there is no such file, or it is not ONNX.
        IntegrityError: a file is not what the manifest says, or points outside its folder.

    Attributes:
        session: ONNX Runtime's own, for inputs and outputs other than `run` knows.
        prefix: tokens that the exported model holds before every text; none without a manifest.
    """

    def __init__(self, path: str | Path) -> None:
        ort = runtime("onnxruntime")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        file = trusted(_file(path))
        self.prefix = _prefix(file)
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Any) -> np.ndarray:
        """The logits, float32 (B, T, V).

        Args:
            inputs: name → tensor or array; or one, or several in the order of the file's inputs.

        Raises:
            DataError: the inputs are not the file's, or hold NaN.
        """
        wanted = self.session.get_inputs()
        described = ", ".join(f"{x.name} {x.shape} {x.type}" for x in wanted)
        if not isinstance(inputs, Mapping):
            several = inputs if isinstance(inputs, Sequence) else (inputs,)
            if len(several) != len(wanted):
                raise DataError(f"{len(several)} inputs given, the file takes {described}.")
            inputs = dict(zip((x.name for x in wanted), several, strict=True))
        if set(inputs) != {x.name for x in wanted}:
            raise DataError(f"inputs are {sorted(inputs)}, the file takes {described}.")
        feeds = {x.name: _array(inputs[x.name], x.name, DTYPES[x.type]) for x in wanted}
        for x in wanted:
            if list(feeds[x.name].shape) != x.shape:
                raise DataError(
                    f"{x.name} has shape {list(feeds[x.name].shape)}, the file takes "
                    f"{described}. Export again with a dummy_input of this shape."
                )
        return self.session.run(["logits"], feeds)[0]

    def module(self) -> Runner:
        """This session as a torch module, for `perplexity` and `evaluate_tasks`.

        Token ids (b, t), t ≤ L → logits (b, t, V), in as many calls as the file's batch needs. What
        stands behind a token does not reach it: rows are padded there.

        Raises:
            DataError: the file takes more than token ids.
        """
        return Runner(self)

    def perplexity(self, tokens: Tensor, *, progress: bool = True) -> float:
        """As `evaluate.perplexity`, with windows of the file's length.

        A shorter last window is padded; what stands behind a token does not reach it.
        """
        model = self.module()
        return perplexity(model, tokens, model.length, batch_size=model.batch, progress=progress)


class HtpSession(CpuSession):
    """A QDQ file on Qualcomm's HTP, without any help from the CPU.

    On an x86 machine this is Qualcomm's emulation of the HTP: its arithmetic, not its speed. The
    context that `compile_for_htp` left in the folder is used if it was made for this target from
    the QDQ file that is there; else the file is compiled and checked now as `compile_for_htp` does,
    and nothing of that is kept.

    Args:
        path: the folder that `export` wrote, or a QDQ file; of fixed shapes.
        htp_arch: as in `compile_for_htp`.
        soc_model: as in `compile_for_htp`.
        check: as in `compile_for_htp`.

    Attributes:
        operations: number of operations, all of them on the HTP.
        seconds: time the compiler took, now or then.

    Raises:
        MissingRuntimeError, CompileError, IntegrityError, DataError: as in `compile_for_htp`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        htp_arch: str = "73",
        soc_model: int | None = None,
        check: bool = True,
    ) -> None:
        target = Target(htp_arch, soc_model)
        runtime("onnxruntime_qnn")
        file = _file(path)
        self.prefix = _prefix(file)
        made = current_context(trusted(file), target)
        if made is not None:
            self.operations, self.seconds = made["operations"], made["seconds"]
            self.session = htp_session(trusted(file.with_name(CONTEXT)), target)
            return
        with tempfile.TemporaryDirectory() as scratch:
            outcome = compiled(file, target, Path(scratch))
            self.operations, self.seconds = len(outcome.operations), outcome.seconds
            self.session = htp_session(Path(scratch, CONTEXT), target)
        if check:
            deviation_of(self.session, file, target)


def run_on_cpu(path: str | Path, inputs: Any) -> np.ndarray:
    """`CpuSession(path).run(inputs)`: the logits of a QDQ file, float32 (B, T, V)."""
    return CpuSession(path).run(inputs)


def run_on_htp(
    path: str | Path, inputs: Any, *, htp_arch: str = "73", soc_model: int | None = None
) -> np.ndarray:
    """`HtpSession(path, ...).run(inputs)`: the logits on Qualcomm's HTP, float32 (B, T, V)."""
    return HtpSession(path, htp_arch=htp_arch, soc_model=soc_model).run(inputs)


def perplexity_on_cpu(path: str | Path, tokens: Tensor, *, progress: bool = True) -> float:
    """Perplexity of a QDQ file on the CPU, as `perplexity` defines it.

    Args:
        path: the folder that `export` wrote, or a QDQ file whose only input is token ids (B, L).
        tokens: token ids (N,) or (1, N), N ≥ 2; evaluated in windows of L.
        progress: say how far it is.

    Raises:
        MissingRuntimeError, IntegrityError: as in `CpuSession`.
        DataError: as in `perplexity`, or the file takes more than token ids.
    """
    return CpuSession(path).perplexity(tokens, progress=progress)


def perplexity_on_htp(
    path: str | Path,
    tokens: Tensor,
    *,
    htp_arch: str = "73",
    soc_model: int | None = None,
    progress: bool = True,
) -> float:
    """Perplexity of a QDQ file on Qualcomm's HTP; compiled once, as in `HtpSession`.

    Args, Raises: as in `perplexity_on_cpu` and `compile_for_htp`.
    """
    session = HtpSession(path, htp_arch=htp_arch, soc_model=soc_model)
    return session.perplexity(tokens, progress=progress)


class Runner(nn.Module):
    """A session as a torch module: token ids (b, t) with t ≤ L → logits (b, t, V).

    Attributes:
        batch: rows B that the file takes at once.
        length: tokens L of a row.
        prefix: tokens that the exported model holds before each row.
    """

    def __init__(self, session: CpuSession) -> None:
        super().__init__()
        inputs = session.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 2:
            described = ", ".join(f"{x.name} {x.shape}" for x in inputs)
            raise DataError(
                f"the file takes {described}; perplexity needs token ids (batch, length) alone. "
                "Export with dummy_input=model.dummy_input(length=...)."
            )
        self.session = session
        self.batch, self.length = inputs[0].shape
        shapes = {y.name: y.shape for y in session.session.get_outputs()}
        vocabulary = shapes["logits"][-1]
        self.prefix = session.prefix
        positions = len(self.prefix) + self.length  # what a model holds has positions too
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=positions)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self._rows(rows) for rows in ids.split(self.batch)])

    def _rows(self, ids: Tensor) -> Tensor:
        padded = torch.zeros(self.batch, self.length, dtype=torch.long)
        padded[: ids.shape[0], : ids.shape[1]] = ids
        logits = torch.from_numpy(self.session.run(padded))
        return logits[: ids.shape[0], : ids.shape[1]].to(ids.device)


def _prefix(file: Path) -> tuple[int, ...]:
    there = (file.parent / MANIFEST).is_file()
    return tuple(read_manifest(file.parent).get("prefix", ())) if there else ()


def _file(path: str | Path) -> Path:
    file = Path(path)
    return file / QDQ if file.is_dir() else file


def _array(value: Any, name: str, dtype: Any) -> np.ndarray:
    if isinstance(value, Tensor):  # perhaps on a GPU
        check_tensor(value, name)
        value = value.detach().cpu()
    array = np.asarray(value, dtype=dtype)
    if np.isnan(array).any():  # the file's quantizers would make a number of it
        raise DataError(f"{name} holds NaN. Clean the data.")
    return array
