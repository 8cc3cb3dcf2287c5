"""Whether what was simulated is what runs: one report on the folder that `export` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifacts.manifest import read_manifest
from .file_checks import check_encodings, check_files, list_sizes
from .htp import Target
from .logit_checks import LogitChecks
from .text_checks import TextChecks, check_lowering
from .verify_report import VerifyReport

AIMET_ONNX = "AIMET_ONNX_PYTHON"
"""Environment variable: the Python of an environment that has aimet-onnx."""


def verify(
    folder: str | Path,
    tokens: Tensor | None = None,
    *,
    sim: Any = None,
    htp: bool = True,
    htp_arch: str = "73",
    soc_model: int | None = None,
    aimet_onnx: str | Path | None = None,
    min_agreement: float = 0.99,
    max_change: float = 0.01,
    progress: bool = True,
) -> VerifyReport:
    """Check that the files of an export are what was exported and compute what was simulated.

    Files have the hashes in the manifest; every device operation has an encoding, every encoding
    names a tensor; `model.onnx` gives torch's float logits; `model_qdq.onnx` on the CPU gives the
    sim's; it lowers to the HTP whole, and there gives the sim's tokens and perplexity; AIMET's
    ONNX package loads the files and gives the sim's logits. Where tokens or perplexity differ by
    more than is allowed, the sim given is also computed in float64: nearer to it than it is to
    itself no file can be. docs/deployment.md shows a report.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        folder: what `export` returned. When a file changed, nothing else is opened.
        tokens: token ids (N,) or (1, N) to compare on; the reference inputs of the folder when
            None. They should be text the model knows: to anything else most tokens nearly tie.
        sim: the sim that was exported; without it the QDQ file on the CPU, which is checked
            against the sim's logits in the folder, stands for it.
        htp: compile for the HTP and run there.
        htp_arch: as in `compile_for_htp`.
        soc_model: as in `compile_for_htp`.
        aimet_onnx: Python of an environment with aimet-onnx; the environment variable
            AIMET_ONNX_PYTHON when None.
        min_agreement: least share of positions where the HTP finds the sim's most likely token.
            Where several tie, in 8 bits one in twenty, one of them in common is enough.
        max_change: largest relative change of the perplexity, CPU and HTP against the sim.
        progress: say how far it is.

    Returns:
        The report: `print` it; `report.ok`, `report.findings`, `report.to_json()`.

    Raises:
        DataError: not the folder of an export, no reference in it, tokens as in `perplexity`, or
            `aimet_onnx` does not run.
        MissingRuntimeError: onnxruntime or, with `htp`, onnxruntime-qnn is not installed.
    """
    target = Target(htp_arch, soc_model)
    report = VerifyReport(Path(folder))
    manifest = read_manifest(report.folder)
    if not check_files(report, manifest):
        return report
    check_encodings(report)
    logits = LogitChecks(report)
    logits.in_floats()
    on_cpu = logits.on_cpu()
    if sim is not None:
        logits.of_sim(sim)
    on_htp = check_lowering(report, target) if htp else None
    text = TextChecks(logits, on_cpu, on_htp, sim, min_agreement, max_change)
    text.on(tokens, progress)
    logits.in_aimet_onnx(aimet_onnx or os.environ.get(AIMET_ONNX))
    list_sizes(report, manifest)
    return report
