"""The checks of `verify` on logits: the same inputs computed in other ways."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts.manifest import MODEL, QDQ
from ..artifacts.reference import read_reference
from ..errors import DataError
from .logit_differences import Difference, Logits, output_step
from .sessions import CpuSession
from .verify_report import VerifyReport

FP_TOLERANCE = 1e-4
"""Largest difference of the float logits, as a share of their range."""

LEVELS = 255
"""The mean difference from the sim may be the logits' range by this: one step of 8 bits."""


class LogitChecks:
    """Logits of the folder's reference inputs beside those that torch computed at the export.

    Args:
        report: of a folder whose files are what was exported; each check adds a line to it.

    Attributes:
        inputs: name in the ONNX files → tensor.
        step: quantization step of the logits: differences are counted in it.

    Raises:
        DataError: the folder has no usable reference.
    """

    def __init__(self, report: VerifyReport) -> None:
        self.report = report
        self._reference = read_reference(report.folder)
        self.inputs: dict[str, Tensor] = self._reference.inputs
        spread = float(self._reference.sim.max() - self._reference.sim.min())
        self.step = output_step(report.folder / QDQ) or spread / LEVELS
        self._limit = spread / LEVELS / self.step

    def in_floats(self) -> None:
        """`model.onnx` against torch, both without activation quantizers."""
        got = CpuSession(self.report.folder / MODEL).run(self.inputs)
        fp = self._reference.fp
        error = (self._reference.rows(torch.from_numpy(got)) - fp).abs().max()
        share = float(error / (fp.max() - fp.min()))
        self.report.numbers["float_error"] = share
        detail = f"largest difference {share:.1e} of the logits' range; at most {FP_TOLERANCE:.0e}"
        self.report.add("ONNX = torch, float", share <= FP_TOLERANCE, detail)

    def on_cpu(self) -> CpuSession:
        """`model_qdq.onnx` on the CPU against the sim as it was exported; the session."""
        self.report.numbers["output_step"] = self.step
        session = CpuSession(self.report.folder)
        self.beside_the_sim("QDQ on CPU = sim", session.run(self.inputs))
        return session

    def of_sim(self, sim: Any) -> None:
        """A sim against the sim as it was exported."""
        from aimet_torch.utils import in_eval_mode  # loaded by whoever has a sim

        model = sim.model
        device = next(model.parameters()).device
        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        with torch.no_grad(), in_eval_mode(model):
            logits = Logits(model)(**inputs)
        self.beside_the_sim("sim = exported sim", logits.cpu().numpy())

    def in_aimet_onnx(self, python: str | Path | None) -> None:
        """AIMET's ONNX package with the same files, in its own environment."""
        name = "aimet-onnx = sim"
        if python is None:
            how = "AIMET_ONNX_PYTHON=… or aimet_onnx=… names the Python that has it"
            self.report.add(name, None, how)
            return
        with tempfile.TemporaryDirectory() as scratch:
            inputs, output = Path(scratch, "inputs.json"), Path(scratch, "logits")
            given = {
                k: (str(x.dtype).removeprefix("torch."), x.tolist()) for k, x in self.inputs.items()
            }
            inputs.write_text(json.dumps(given), encoding="utf-8")
            problem = _run_aimet_onnx(python, self.report.folder, inputs, output)
            if problem:
                self.report.add(name, False, problem)
                return
            vocabulary = self._reference.sim.shape[-1]
            logits = np.fromfile(output, np.float32).reshape(1, -1, vocabulary)
            about = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        self.report.numbers["aimet-onnx"] = about
        self.beside_the_sim(name, logits)

    def beside_the_sim(self, name: str, logits: np.ndarray) -> Difference:
        """Add a check: logits (B, T, V) of the reference inputs against the exported sim's."""
        difference = Difference(self.step)
        difference.add(self._reference.rows(torch.from_numpy(logits)), self._reference.sim)
        self.report.numbers[name] = asdict(difference)
        detail = f"{difference}; mean at most {self._limit:.1f}"
        self.report.add(name, difference.mean <= self._limit, detail)
        return difference


def _run_aimet_onnx(python: str | Path, folder: Path, inputs: Path, output: Path) -> str | None:
    """Run `in_aimet_onnx.py`; the last line it said when it failed."""
    script = Path(__file__).with_name("in_aimet_onnx.py")
    # -I: this folder and PYTHONPATH stay out of what that Python imports.
    command = [str(python), "-I", str(script), str(folder), str(inputs), str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise DataError(f"{python} does not run: {e}. Pass a Python interpreter.") from e
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None
