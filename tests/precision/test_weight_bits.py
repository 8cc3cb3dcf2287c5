"""Weights of 4 bits, a range a channel, a block or a grouped block (LPBQ), as AIMET offers them."""

from __future__ import annotations

import pytest
import torch
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from deployed import check_same_but_for_rounding, steps
from tiny import BLOCKS, batches, outlier_gpt2, outlier_llama, simulate

from aimet_quadapter import apply_quadapter, export
from aimet_quadapter.device.sessions import run_on_cpu


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
    sim = simulate(build(layers=1), default_param_bw=4, default_output_bw=activation_bits)
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
    result = apply_quadapter(sim, batches(), calibration=BLOCKS)
    assert result.calibration.error_ratio("ones")["norm-linear"] < 0.5
    assert {name: q.bitwidth for name, q in sim.named_quantizers()} == widths
    ids = batches(seed=5)[0][:1]
    folder = export(sim, ids, tmp_path / "out")
    found = steps(run_on_cpu(folder, ids), sim, ids)
    check_same_but_for_rounding(found, activation_bits)
