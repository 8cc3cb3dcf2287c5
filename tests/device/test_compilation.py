"""What the backend takes and computes wrongly is found by what it computes, whatever the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from deployed import folder_of, quantized, seal
from tiny import VOCAB, gpt2, llama
from torch import nn

from aimet_quadapter import (
    CompileError,
    HtpSession,
    IntegrityError,
    compile_for_htp,
    export,
    prepare,
    set_ranges,
    verify,
)
from aimet_quadapter.cli import main

LENGTH = 32

Change = Callable[[QuantizationSimModel], None]


def linears(sim: QuantizationSimModel) -> list[nn.Module]:
    return [m for _, m in sim.named_qmodules() if isinstance(m, nn.Linear)]


def as_it_is(_: QuantizationSimModel) -> None:
    """Weights of 4 bits, a range a channel."""


def blocks(sim: QuantizationSimModel) -> None:
    set_blockwise_quantization_for_weights(
        sim, linears(sim), bitwidth=4, symmetric=True, block_size=16
    )


def grouped_blocks(sim: QuantizationSimModel) -> None:
    set_grouped_blockwise_quantization_for_weights(
        sim,
        linears(sim),
        bitwidth=4,
        symmetric=True,
        block_size=16,
        decompressed_bw=8,
        block_grouping=-1,
    )


def encoded_biases(sim: QuantizationSimModel) -> None:
    for linear in linears(sim):
        if linear.bias is not None:
            linear.param_quantizers["bias"] = QuantizeDequantize((), 32, symmetric=True)


def not_symmetric(sim: QuantizationSimModel) -> None:
    for linear in linears(sim):
        linear.param_quantizers["weight"].symmetric = False


def embedding_rows(sim: QuantizationSimModel) -> None:
    for _, module in sim.named_qmodules():
        if isinstance(module, nn.Embedding):
            shape = (module.weight.shape[0], 1)
            module.param_quantizers["weight"] = QuantizeDequantize(shape, 8, symmetric=True)


def wide_norms(sim: QuantizationSimModel) -> None:
    for _, module in sim.named_qmodules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.param_quantizers["weight"].bitwidth = 16


def exported(
    to: Path, build: Any = gpt2, change: Change = as_it_is, bits: int = 16, length: int = LENGTH
) -> Path:
    """A small model in a format, its ranges set on random text."""
    ids = torch.randint(0, VOCAB, (4, length))
    sim = QuantizationSimModel(
        prepare(build(layers=1)),
        ids[:1],
        config_file="htp_v73",
        default_output_bw=bits,
        default_param_bw=4,
    )
    change(sim)
    set_ranges(sim, [ids])
    return export(sim, ids[:1], to)


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("change", "length", "why"),
    [
        (grouped_blocks, LENGTH, r"\n5 weights have a range a block: .* without a bias"),
        (encoded_biases, LENGTH, r"\n4 biases have an encoding: .*Remove their quantizers"),
        (as_it_is, 16, "check=False"),  # no format at all: docs/generation.md, Traps
    ],
)
def test_a_format_that_the_backend_computes_wrongly_is_said(tmp_path, change, length, why) -> None:
    folder = exported(tmp_path / "out", change=change, length=length)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for use in (compile_for_htp, HtpSession):
        with pytest.raises(CompileError, match=r"something else.*\d% of their range(.|\n)*" + why):
            use(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    findings = [check.name for check in verify(folder, progress=False).findings]
    assert "same token on HTP" in findings
    context = compile_for_htp(folder, check=False)
    assert str(context).endswith("not compared with the sim")


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("build", "change", "bits"),
    [
        (gpt2, as_it_is, 8),
        (llama, grouped_blocks, 16),
        (llama, blocks, 16),
        (llama, wide_norms, 16),
    ],
)
def test_a_format_that_the_backend_computes_rightly_is_let_through(
    tmp_path, build, change, bits
) -> None:
    folder = exported(tmp_path / "out", build, change, bits)
    context = compile_for_htp(folder)
    print(context)
    assert context.deviation is not None
    assert context.deviation < {8: 0.03, 16: 0.01}[bits]
    assert f"logits {context.deviation:.2%} of their range from the sim's" in str(context)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["htp"]["deviation"] == context.deviation


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("change", "bits", "why"),
    [
        (blocks, 16, "5 weights have a range a block"),
        (not_symmetric, 16, "5 weights have a range a channel that is not symmetric"),
        (embedding_rows, 8, "2 embeddings have several ranges"),
    ],
)
def test_a_format_that_the_backend_refuses_is_named(tmp_path, change, bits, why) -> None:
    with pytest.raises(CompileError, match=why) as caught:
        compile_for_htp(exported(tmp_path / "out", change=change, bits=bits))
    assert "give it an encoding" not in str(caught.value)


@pytest.mark.deploy
def test_rmsnorm_weights_of_16_bits_need_activations_of_16(tmp_path) -> None:
    with pytest.raises(CompileError, match="RMSNormalization"):
        compile_for_htp(exported(tmp_path / "out", llama, wide_norms, 8))


@pytest.mark.deploy
def test_a_folder_without_reference_is_not_compared_and_a_changed_one_refused(
    tmp_path, capsys
) -> None:
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    assert compile_for_htp(folder).deviation is None
    folder = exported(tmp_path / "out", bits=8)
    (folder / "reference.safetensors").write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"reference\.safetensors .* changed"):
        compile_for_htp(folder)
    assert main(["compile", str(folder), "--no-check"]) == 0
    assert "not compared with the sim" in capsys.readouterr().out
    assert main(["compile", str(seal(folder))]) == 2
    assert "no usable reference" in capsys.readouterr().err
