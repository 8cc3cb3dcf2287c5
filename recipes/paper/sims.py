"""A model and settings → the sim that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimet_torch import QuantizationSimModel
from aimet_torch.nn.modules import custom
from torch import nn

from aimet_quadapter import keep_module_sites, prepare

PER_TENSOR = Path(__file__).with_name("per_tensor_asymmetric.json")
"""AIMET configuration with one asymmetric range a tensor, as the paper's."""


def make_sim(hf_model: Any, settings: Mapping[str, Any], device: str) -> QuantizationSimModel:
    """The sim of the prepared model, no range set yet."""
    prepared = prepare(hf_model).to(device)
    config_file = settings["config_file"]
    sim = QuantizationSimModel(
        prepared,
        prepared.dummy_input(),
        default_output_bw=settings["activation_bits"],
        default_param_bw=settings["weight_bits"],
        config_file=str(PER_TENSOR) if config_file == "per-tensor-asymmetric" else config_file,
    )
    leave_sites(sim, settings["sites"])
    return sim


def leave_sites(sim: QuantizationSimModel, sites: str) -> None:
    """Switch the activation quantizers off that a set of sites does not have.

    Args:
        sim: the sim of a prepared model, every operation quantized.
        sites: "all"; "modules", AIMET's own of a HuggingFace model; "paper", all "except for
            biases, nonlinear operations, and additions".
    """
    if sites == "modules":
        keep_module_sites(sim)
    elif sites == "paper":
        for _, module in sim.named_qmodules():
            if isinstance(module, (custom.Add, nn.Softmax, nn.GELU, nn.Sigmoid)):
                module.output_quantizers[0] = None
