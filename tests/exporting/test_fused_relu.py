"""Operations fused with their activation: covered, exported, and compiled whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import check_same_but_for_rounding, steps
from tiny import decoder_sim, gpt2, llama, tokens

from aimet_quadapter import HtpSession, coverage, export
from aimet_quadapter.artifacts.exported import check_export
from aimet_quadapter.device.logit_differences import DEVIATION
from aimet_quadapter.device.sessions import run_on_cpu

RELU = {
    "gpt2": lambda: gpt2(1, activation_function="relu"),
    "llama": lambda: llama(1, hidden_act="relu"),
}


@pytest.mark.deploy
@pytest.mark.parametrize("name", RELU)
def test_a_decoder_with_relu_is_exported_and_compiles_whole(name: str, tmp_path: Path) -> None:
    sim = decoder_sim(RELU[name](), calibrated=True, config_file="htp_v73")
    assert not coverage(sim).missing
    ids = tokens(1, 8)
    folder = export(sim, ids, tmp_path / "out")  # strict: coverage and export read one config
    assert check_export(folder).ok
    check_same_but_for_rounding(steps(run_on_cpu(folder, ids), sim, ids))
    pytest.importorskip("onnxruntime_qnn")
    cpu = run_on_cpu(folder, ids)
    difference = np.abs(HtpSession(folder).run(ids) - cpu).mean()  # raises unless all lowers
    assert difference <= DEVIATION * np.ptp(cpu)


def test_a_relu_that_is_not_fused_is_still_missing(tmp_path: Path) -> None:
    sim: Any = decoder_sim(RELU["gpt2"](), calibrated=True, config_file="htp_v73")
    with torch.no_grad():
        sim.model.transformer.h[0].mlp.act.output_quantizers[0] = None
    assert coverage(sim).missing
    folder = export(sim, tokens(1, 8), tmp_path / "out", strict=False)
    assert not check_export(folder).ok
