"""The exported files on Qualcomm's HTP backend, with no help from the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aimet_torch import QuantizationSimModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aimet_quadapter import apply_quadapter, default_text, load_default, prepare
from aimet_quadapter.deploy import run_on_cpu, run_on_htp
from aimet_quadapter.errors import DataError
from aimet_quadapter.export import export

LENGTH = 64


def build(model: PreTrainedModel, ids: torch.Tensor, folder: Path, bits: int):
    """Sim with weights of 8 and activations of `bits` bits after Quadapter, and its export."""
    sim = QuantizationSimModel(
        prepare(model), ids[:1], config_file="htp_v73", default_output_bw=bits
    )
    apply_quadapter(sim, ids[:, None])
    return sim, export(sim, ids[:1], folder)


def compare(name: str, sim: QuantizationSimModel, folder: Path, ids: torch.Tensor):
    """Logits on the HTP against the sim's: mean and largest difference in steps, argmax."""
    with torch.no_grad():
        expected = sim.model(ids).numpy()
    got = run_on_htp(folder, ids)
    scale = sim.model.lm_head.output_quantizers[0].get_scale()
    steps = np.abs(got - expected) / float(scale.detach())
    agree = (got.argmax(-1) == expected.argmax(-1)).mean()
    print(f"{name}: {steps.mean():.2f} steps mean, {steps.max():.0f} max, argmax {agree:.1%}")
    return steps, agree


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Four windows of real text for the embedded model."""
    _, tokenizer = load_default()
    ids = tokenizer(default_text("calibration")[:20_000], return_tensors="pt")["input_ids"][0]
    return ids[: 4 * LENGTH].reshape(4, LENGTH)


@pytest.mark.deploy
@pytest.mark.parametrize("bits", [8, 16])
def test_the_embedded_gpt2_runs_whole_on_the_htp(windows, tmp_path, bits) -> None:
    sim, folder = build(load_default()[0], windows, tmp_path / "out", bits)
    steps, agree = compare(f"GPT-2 W8A{bits}", sim, folder, windows[:1])
    assert np.isfinite(steps).all()
    assert agree > {8: 0.5, 16: 0.9}[bits]


@pytest.mark.deploy
@pytest.mark.parametrize("bits", [8, 16])
def test_a_llama_runs_whole_on_the_htp(tmp_path, bits) -> None:
    """RMSNorm, rotary positions, grouped queries and SiLU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(0, 300, (4, LENGTH))
    sim, folder = build(LlamaForCausalLM(config).eval(), ids, tmp_path / "out", bits)
    steps, agree = compare(f"Llama W8A{bits}", sim, folder, ids[:1])
    assert steps.mean() < {8: 2, 16: 60}[bits]
    assert agree > {8: 0.8, 16: 0.9}[bits]  # random weights: near ties


def test_a_missing_runtime_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(ImportError, match=r"onnxruntime-qnn.*aimet_quadapter\[deploy\]"):
        run_on_htp(tmp_path, torch.zeros(1, 8))


def test_inputs_that_are_not_the_files_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no"):
        run_on_cpu(tmp_path, torch.zeros(1, 8))
