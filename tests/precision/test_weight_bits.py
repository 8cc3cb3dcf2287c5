"""Weights of 4 bits, a range a channel, a block or a grouped block (LPBQ), as AIMET offers them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from tiny import FAST, batches, outlier_gpt2, outlier_llama, simulate

from aimet_quadapter import apply_quadapter, export
from aimet_quadapter.device.sessions import run_on_cpu

STEPS = {8: 1, 16: 8}
"""Activation bits → output steps that the exported file may differ by: sums in another order move a
rounding inside the model, and a step of 16 bits is small."""


@pytest.mark.parametrize(
    ("build", "kind", "activation_bits"),
    [
        (outlier_gpt2, "channel", 8),
        (outlier_gpt2, "block", 16),
        (outlier_gpt2, "grouped block", 8),
        (outlier_llama, "channel", 16),
        (outlier_llama, "grouped block", 16),
    ],
)
def test_four_bit_weights_are_learned_for_and_exported(build, kind, activation_bits, tmp_path):
    sim = simulate(build(), default_param_bw=4, default_output_bw=activation_bits)
    linears = [
        module
        for name, module in sim.named_qmodules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    settings = {"bitwidth": 4, "symmetric": True, "block_size": 8}
    if kind == "block":
        set_blockwise_quantization_for_weights(sim, linears, **settings)
    elif kind == "grouped block":
        set_grouped_blockwise_quantization_for_weights(
            sim, linears, **settings, decompressed_bw=8, block_grouping=-1
        )
    widths = {name: q.bitwidth for name, q in sim.named_quantizers()}
    result = apply_quadapter(sim, batches(), calibration=FAST)
    assert result.calibration.error_ratio("ones")["norm-linear"] < 0.5
    assert {name: q.bitwidth for name, q in sim.named_quantizers()} == widths
    ids = batches(seed=5)[0][:1]
    folder = export(sim, ids, tmp_path / "out")
    with torch.no_grad():
        expected = sim.model(ids).numpy()
    step = float(sim.model.lm_head.output_quantizers[0].get_scale().detach())
    steps = np.abs(run_on_cpu(folder, ids) - expected).max() / step
    assert steps <= STEPS[activation_bits] + 0.01
