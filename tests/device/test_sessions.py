"""The exported files on the CPU and on Qualcomm's HTP, with no help from the CPU there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from aimet_torch import QuantizationSimModel
from deployed import LENGTH, copy, embedded, folder_of, quantized, seal, steps, text
from onnx import TensorProto, helper, numpy_helper
from tiny import FAST
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aimet_quadapter import (
    CompileError,
    CpuSession,
    DataError,
    HtpSession,
    IntegrityError,
    MissingRuntimeError,
    apply_quadapter,
    compensate_softmax,
    compile_for_htp,
    export,
    perplexity,
    perplexity_on_cpu,
    perplexity_on_htp,
    prepare,
    rotate,
    run_on_cpu,
    run_on_htp,
    set_prefix,
)
from aimet_quadapter.artifacts.exported import check_export
from aimet_quadapter.artifacts.manifest import CONTEXT, CONTEXT_BINARY, MODEL


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, W8A8, with its context."""
    folder = copy(embedded(8)[1], tmp_path_factory.mktemp("compiled") / "out")
    context = compile_for_htp(folder)
    assert str(context).startswith(f"{folder / CONTEXT}: {context.operations} of ")
    return folder


@pytest.mark.deploy
@pytest.mark.parametrize("bits", [8, 16])
def test_the_embedded_gpt2_runs_whole_on_the_htp(bits) -> None:
    sim, folder = embedded(bits)
    ids = text("heldout")[None, :LENGTH]
    got = run_on_htp(folder, ids)
    with torch.no_grad():
        agree = (got.argmax(-1) == sim.model(ids).numpy().argmax(-1)).mean()
    found = steps(got, sim, ids)
    print(f"W8A{bits}: {found.mean():.2f} steps mean, {found.max():.0f} max, argmax {agree:.1%}")
    assert found.mean() < {8: 4, 16: 60}[bits]
    assert agree > {8: 0.8, 16: 0.95}[bits]


def small_llama(change: Callable[[Any], None] = lambda model: None, bits: int = 8) -> tuple:
    """A Llama with `change` made to it, after Quadapter; sim and token ids (4, 1, T)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(0, 300, (4, 1, LENGTH))
    model = prepare(LlamaForCausalLM(config).eval())
    change(model)
    ids = ids[..., : LENGTH - len(model.prefix)]  # the places are as many as before
    sim = QuantizationSimModel(model, ids[0], config_file="htp_v73", default_output_bw=bits)
    apply_quadapter(sim, ids, calibration=FAST)
    return sim, ids


@pytest.mark.deploy
@pytest.mark.parametrize("bits", [8, 16])
def test_a_llama_runs_whole_on_the_htp(tmp_path, bits) -> None:
    """RMSNorm, rotary positions, grouped queries and SiLU."""
    sim, ids = small_llama(bits=bits)
    got = run_on_htp(export(sim, ids[0], tmp_path / "out"), ids[0])
    found = steps(got, sim, ids[0])
    print(f"Llama W8A{bits}: {found.mean():.2f} steps mean, {found.max():.0f} max")
    assert found.mean() < {8: 2, 16: 60}[bits]


@pytest.mark.deploy
def test_a_llama_behind_a_prefix_turned_and_made_up_for_runs_whole_on_the_htp(tmp_path) -> None:
    """The constants of the prefix and the biases of `compensate_softmax` are in the file."""

    def change(model: Any) -> None:
        set_prefix(model, [3, 5])
        rotate(model)

    sim, ids = small_llama(change)
    plain = logits(sim, ids[0])
    compensate_softmax(sim, ids)
    assert not np.array_equal(logits(sim, ids[0]), plain)
    assert sim.model.model.layers[0].self_attn.o_proj.bias is not None
    folder = export(sim, ids[0], tmp_path / "out")
    found = steps(run_on_htp(folder, ids[0]), sim, ids[0])
    print(f"compensated: {found.mean():.2f} steps mean, {found.max():.0f} max")
    assert found.mean() < 2


def logits(sim: QuantizationSimModel, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return sim.model(ids).numpy()


@pytest.mark.deploy
def test_the_context_gives_what_compiling_in_memory_gives(compiled) -> None:
    ids = text("heldout")[None, :LENGTH]
    session = HtpSession(compiled)
    assert session.operations >= check_export(compiled).operations[MODEL]
    first = session.run(ids)
    assert np.array_equal(first, session.run(ids))
    assert np.array_equal(first, run_on_htp(embedded(8)[1], ids))


@pytest.mark.deploy
def test_the_context_is_in_the_manifest_and_the_same_each_time(compiled, tmp_path) -> None:
    assert names(compiled) == names(embedded(8)[1]) | {CONTEXT, CONTEXT_BINARY}
    assert check_export(compiled).ok
    manifest = json.loads((compiled / "manifest.json").read_text())
    assert manifest["htp"]["htp_arch"] == "73"
    assert manifest["htp"]["source"] == manifest["files"]["model_qdq.onnx"]["sha256"]
    again = copy(embedded(8)[1], tmp_path / "again")
    compile_for_htp(again)
    for name in (CONTEXT, CONTEXT_BINARY):
        assert (again / name).read_bytes() == (compiled / name).read_bytes()


@pytest.mark.deploy
def test_the_context_is_used_only_while_it_fits(compiled, tmp_path, monkeypatch) -> None:
    used = []
    real = HtpSession.__init__.__globals__["compiled"]
    monkeypatch.setitem(
        HtpSession.__init__.__globals__, "compiled", lambda *a: used.append(a[1]) or real(*a)
    )
    folder = copy(compiled, tmp_path / "out")
    HtpSession(folder)
    assert not used
    HtpSession(folder, htp_arch="75")
    HtpSession(folder, soc_model=57)
    assert [str(target) for target in used] == ["HTP v75", "HTP v73, SoC 57"]
    model = onnx.load(folder / "model_qdq.onnx")
    model.producer_name = "someone else"
    onnx.save(model, folder / "model_qdq.onnx")
    seal(folder)  # another file, honestly listed: the context is of the old one
    HtpSession(folder)
    assert len(used) == 3


@pytest.mark.deploy
def test_perplexity_is_defined_as_everywhere(compiled) -> None:
    tokens = text("heldout")[: LENGTH + 20]  # the last window is padded
    of_sim = perplexity(embedded(8)[0], tokens, LENGTH, progress=False)
    on_cpu = perplexity_on_cpu(compiled, tokens, progress=False)
    on_htp = perplexity_on_htp(compiled, tokens, progress=False)
    print(f"perplexity: sim {of_sim:.3f}, CPU {on_cpu:.3f}, HTP {on_htp:.3f}")
    assert on_cpu == pytest.approx(of_sim, rel=3e-2)  # rounding alone: 1% on 128 tokens
    assert on_htp == pytest.approx(of_sim, rel=5e-2)
    assert on_htp != on_cpu


def test_perplexity_needs_token_ids_alone_and_known_ones(tmp_path) -> None:
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    with pytest.raises(DataError, match=r"the file takes x \[2, 4, 8\]; perplexity needs token"):
        perplexity_on_cpu(folder, torch.arange(20))
    with pytest.raises(DataError, match="the model knows 0 … 2047"):
        perplexity_on_cpu(embedded(8)[1], torch.arange(2040, 2060))


@pytest.mark.deploy
def test_an_operation_that_does_not_lower_is_named_and_nothing_is_left(tmp_path) -> None:
    folder = folder_of(quantized("Erf"), tmp_path / "erf")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CompileError) as caught:
        compile_for_htp(folder)
    message = str(caught.value)
    assert "1 of 1 operations of model_qdq.onnx do not lower to HTP v73" in message
    assert re.search(r"the_Erf \(Erf\): \S.*`?Erf`?", message)  # and why, in the backend's words
    assert "export with opset=23" in message
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["erf"]
    with pytest.raises(CompileError, match="the_Erf"):
        run_on_htp(folder, np.zeros((2, 4, 8)))


@pytest.mark.deploy
def test_an_operation_that_fails_late_is_found_by_compiling_it_alone(tmp_path) -> None:
    """The provider takes this one; the compiler behind it fails, and speaks of memory."""
    indices, updates = np.array([[0], [1]]), np.ones((2, 4, 8), np.float32)
    folder = folder_of(quantized("ScatterND", indices, updates), tmp_path / "scatter")
    with pytest.raises(CompileError, match=r"the_ScatterND \(ScatterND\): compiled alone, \S"):
        compile_for_htp(folder)


def test_a_crash_of_the_compiler_is_an_error(tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime_qnn")
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    with pytest.raises(CompileError, match=r"the_Relu .*the compiler crashed \(SIGSEGV\)"):
        compile_for_htp(folder)
    assert names(folder) == {"model_qdq.onnx", "manifest.json"}


def test_a_missing_runtime_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    for use in (compile_for_htp, HtpSession):
        with pytest.raises(MissingRuntimeError, match=r"onnxruntime-qnn.*aimet_quadapter\[deploy"):
            use(folder)
    assert names(folder) == {"model_qdq.onnx", "manifest.json"}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"htp_arch": "99"}, "htp_arch is '99', possible are 68, 69, 73"),
        ({"htp_arch": 73}, "htp_arch is 73"),
        ({"soc_model": "SM8550"}, "soc_model is 'SM8550'"),
    ],
)
def test_an_unknown_target_is_refused(tmp_path, settings, match) -> None:
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    for use in (compile_for_htp, HtpSession):
        with pytest.raises(DataError, match=match):
            use(folder, **settings)


@pytest.mark.deploy
def test_a_chip_that_the_backend_does_not_know_is_refused(tmp_path) -> None:
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    with pytest.raises(CompileError, match=r"does not start for HTP v73, SoC 99999: .*soc_model"):
        compile_for_htp(folder, soc_model=99999)
    assert names(folder) == {"model_qdq.onnx", "manifest.json"}


def test_inputs_that_are_not_the_files_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no"):
        run_on_cpu(tmp_path, torch.zeros(1, 8))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        compile_for_htp(tmp_path)
    session = CpuSession(folder_of(quantized("Relu"), tmp_path / "relu"))
    with pytest.raises(DataError, match=r"x has shape \[2, 4\], the file takes x \[2, 4, 8\]"):
        session.run(np.zeros((2, 4)))
    with pytest.raises(DataError, match="2 inputs given"):
        session.run((np.zeros(1), np.zeros(1)))
    with pytest.raises(DataError, match=r"inputs are \['y'\]"):
        session.run({"y": np.zeros(1)})
    assert session.run(np.ones((2, 4, 8))).shape == (2, 4, 8)


@pytest.fixture
def nothing_opens(monkeypatch) -> None:
    """ONNX Runtime must not see the file."""
    ort = pytest.importorskip("onnxruntime")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(ort, "InferenceSession", fail)


USES = (CpuSession, HtpSession, compile_for_htp)


def test_a_changed_file_is_not_opened(tmp_path, nothing_opens) -> None:
    folder = folder_of(quantized("Relu"), tmp_path / "relu")
    with (folder / "model_qdq.onnx").open("ab") as stream:
        stream.write(b"\x00")
    for use in USES:
        with pytest.raises(IntegrityError, match=r"model_qdq\.onnx .*changed since the export"):
            use(folder)
    seal(folder)
    with pytest.raises(DataError, match="not an ONNX file"):
        CpuSession(folder)


@pytest.mark.deploy
def test_a_changed_context_is_not_opened(compiled, tmp_path, nothing_opens) -> None:
    for name in (CONTEXT, CONTEXT_BINARY):
        folder = copy(compiled, tmp_path / name)
        with (folder / name).open("ab") as stream:
            stream.write(b"\x00")
        with pytest.raises(IntegrityError, match=name):
            HtpSession(folder)


def external(location: str) -> onnx.ModelProto:
    """A model whose constant lies in another file, within a branch of an If."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [8])
    node = helper.make_node("Identity", ["w"], ["logits"])
    branch = helper.make_graph([node], "branch", [], [out], [tensor])
    choice = helper.make_node("If", ["c"], ["logits"], then_branch=branch, else_branch=branch)
    condition = numpy_helper.from_array(np.array(True), "c")
    graph = helper.make_graph([choice], "g", [], [out], [condition])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def context(location: str) -> onnx.ModelProto:
    """A model that is compiled already, into another file."""
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [8])
    node = helper.make_node(
        "EPContext", [], ["logits"], domain="com.microsoft", embed_mode=0,
        ep_cache_context=location,
    )  # fmt: skip
    return helper.make_model(helper.make_graph([node], "g", [], [out]))


@pytest.mark.parametrize("build", [external, context])
@pytest.mark.parametrize("location", ["../secret", "{}/secret", "a/../../secret", "link", ""])
def test_a_file_that_points_out_of_its_folder_is_not_opened(
    tmp_path, nothing_opens, build, location
) -> None:
    (tmp_path / "secret").write_bytes(bytes(32))
    folder = folder_of(build(location.format(tmp_path)), tmp_path / "out")
    (folder / "link").symlink_to(tmp_path / "secret")
    for use in (*USES, lambda f: CpuSession(f / "model_qdq.onnx")):
        with pytest.raises(IntegrityError, match="outside its folder"):
            use(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="outside its folder"):
        CpuSession(folder)


def test_weights_beside_the_file_must_be_in_the_manifest(tmp_path) -> None:
    folder = folder_of(external("weights"), tmp_path / "out")
    np.arange(8, dtype=np.float32).tofile(folder / "weights")
    with pytest.raises(IntegrityError, match=r"weights in .* changed since the export"):
        CpuSession(folder)
    assert np.array_equal(CpuSession(seal(folder)).run(()), np.arange(8, dtype=np.float32))


@pytest.mark.slow
@pytest.mark.deploy
def test_a_gpt2_of_the_real_size_lowers_whole(tmp_path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (1, LENGTH))
    model = prepare(GPT2LMHeadModel(GPT2Config()).eval())
    sim = QuantizationSimModel(model, ids, config_file="htp_v73", default_output_bw=16)
    sim.compute_encodings(lambda m: m(ids))
    done = compile_for_htp(export(sim, ids, tmp_path / "out"))
    print(done)
    assert done.operations >= 1 + 12 * 14 + 2
