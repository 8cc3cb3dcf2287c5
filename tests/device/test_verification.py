"""One report on the folder of an export, and what it must find."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployed import LENGTH, copy, embedded, seal, text
from onnx import numpy_helper

from aimet_quadapter import CompileError, DataError, export, verify
from aimet_quadapter.artifacts.exported import check_export
from aimet_quadapter.artifacts.reference import read_reference
from aimet_quadapter.cli import main
from aimet_quadapter.cli.summary import next_steps
from aimet_quadapter.device.verify_report import Check

AIMET_ONNX = os.environ.get("AIMET_ONNX_PYTHON")


@pytest.fixture(autouse=True)
def _without_aimet_onnx(monkeypatch) -> None:
    monkeypatch.delenv("AIMET_ONNX_PYTHON", raising=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded model's export, W8A8."""
    return copy(embedded(8)[1], tmp_path / "out")


def compiled_whole(text: str, where: str) -> bool:
    """Whether a text says that all operations compiled, as many as have encodings or more.

    How many there are besides, ONNX Runtime decides.
    """
    counts = re.search(rf"(\d+) of (\d+) {where}", text)
    return counts is not None and int(counts[1]) == int(counts[2]) >= 59


def found(folder: Path, **settings: object) -> dict[str, Check]:
    report = verify(folder, **({"htp": False, "progress": False} | settings))
    print(report)
    return {check.name: check for check in report.checks}


@pytest.mark.deploy
def test_a_good_export_has_no_findings(folder) -> None:
    sim, _ = embedded(8)
    tokens = text("heldout")[: 2 * LENGTH + 9]
    # Of 137 positions each is almost 1%, and in 8 bits the HTP's arithmetic is its own.
    limits = {"min_agreement": 0.97, "max_change": 0.05}
    report = verify(folder, tokens, sim=sim, **limits, progress=False)
    print(report)
    assert report.ok, str(report)
    checks = {check.name: check for check in report.checks}
    assert [name for name, check in checks.items() if check.ok is None] == ["aimet-onnx = sim"]
    assert set(checks) >= {
        "files", "encodings", "names of encodings", "ONNX = torch, float", "QDQ on CPU = sim",
        "sim = exported sim", "operations on HTP", "same token on HTP", "perplexity", "sizes",
    }  # fmt: skip
    assert "59 device operations" in checks["encodings"].detail
    assert "of 137 positions" in checks["same token on HTP"].detail
    assert compiled_whole(checks["operations on HTP"].detail, "on HTP v73, compiled in")
    whole = json.loads(report.to_json())
    assert whole["ok"]
    assert set(whole["numbers"]["perplexity"]) == {"sim", "CPU", "HTP"}
    assert "the sim in float64" not in checks  # nothing to explain
    assert whole["numbers"]["sim = exported sim"]["largest"] == 0
    assert whole["numbers"]["bytes"]["model_qdq.onnx"] > 4e6


def test_a_difference_is_set_beside_what_rounding_does_to_the_sim(folder) -> None:
    sim, _ = embedded(8)
    tokens = text("heldout")[: 2 * LENGTH]
    before = {name: x.dtype for name, x in sim.model.state_dict().items() if torch.is_tensor(x)}
    # Nothing is within -1, not even no change: the perplexity is a finding on every processor.
    report = verify(folder, tokens, sim=sim, htp=False, max_change=-1.0, progress=False)
    (line,) = [check for check in report.checks if check.name == "the sim in float64"]
    assert "differs from itself in float32 by 0." in line.detail
    own = report.numbers["sim in float64"]
    assert own["positions"] == len(tokens)
    # One token in twenty ties in 8 bits; a step at few of 128 positions is 1% of the perplexity.
    assert own["same_or_tie"] > 0.95 * len(tokens)
    assert own["perplexity"] == pytest.approx(report.numbers["perplexity"]["sim"], rel=0.05)
    after = {name: x.dtype for name, x in sim.model.state_dict().items() if torch.is_tensor(x)}
    assert after == before


def test_a_changed_file_is_a_finding_and_nothing_is_opened(folder, monkeypatch) -> None:
    monkeypatch.setattr(
        "aimet_quadapter.device.logit_checks.CpuSession", lambda *_: pytest.fail("opened")
    )
    with (folder / "model.encodings").open("a") as stream:
        stream.write(" ")
    (folder / "model.onnx").unlink()
    checks = found(folder)
    assert checks["files"].ok is False
    assert "model.encodings, model.onnx" in checks["files"].detail
    assert set(checks) == {"files", "everything else"}


def test_other_weights_are_a_finding_even_with_the_right_hashes(folder) -> None:
    for name in ("model.onnx", "model_qdq.onnx"):
        model = onnx.load(folder / name)
        for tensor in model.graph.initializer:
            if "ln_f.weight" in tensor.name and len(tensor.dims) == 1:
                changed = numpy_helper.to_array(tensor)[::-1].copy()
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        onnx.save(model, folder / name)
    checks = found(seal(folder))
    assert checks["files"].ok
    assert checks["ONNX = torch, float"].ok is False
    assert checks["QDQ on CPU = sim"].ok is False


def test_a_missing_and_a_stray_encoding_are_findings(folder) -> None:
    encodings = json.loads((folder / "model.encodings").read_text())
    encodings["activation_encodings"][5]["name"] = "nowhere"
    (folder / "model.encodings").write_text(json.dumps(encodings))
    checks = found(seal(folder))
    assert checks["encodings"].ok is False
    assert "1 lack theirs" in checks["encodings"].detail
    assert checks["names of encodings"].detail == "not in model.onnx: nowhere"


def test_what_does_not_lower_is_a_finding(folder, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CompileError("1 of 129 operations do not lower:\n  node (Erf)")

    monkeypatch.setattr("aimet_quadapter.device.text_checks.HtpSession", fail)
    checks = found(folder, htp=True)
    assert checks["operations on HTP"].ok is False
    assert "node (Erf)" in checks["operations on HTP"].detail
    assert checks["QDQ on CPU = sim"].ok
    assert "nothing to compare" in checks["perplexity"].detail


def test_another_sim_is_a_finding(folder) -> None:
    sim, _ = embedded(8)
    weight = sim.model.transformer.ln_f.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.copy_(kept.flip(0))
        try:
            checks = found(folder, sim=sim)
        finally:
            weight.copy_(kept)
    assert checks["sim = exported sim"].ok is False
    assert checks["perplexity"].ok is False


def test_a_folder_without_reference_is_refused(folder, tmp_path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        verify(tmp_path)
    (folder / "reference.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no usable reference\.safetensors"):
        verify(seal(folder))
    (folder / "reference.safetensors").write_bytes(b"\x80\x04\x95pickled?")
    with pytest.raises(DataError, match="Export again"):
        verify(seal(folder))


def test_the_reference_is_what_was_given_and_what_torch_computes() -> None:
    sim, folder = embedded(8)
    reference = read_reference(folder)
    ids = text("heldout")[None, :LENGTH]
    assert torch.equal(reference.inputs["input_ids"], ids)
    with torch.no_grad():
        logits = sim.model(ids)
    assert torch.equal(reference.rows(logits), reference.sim)
    assert not torch.allclose(reference.fp, reference.sim, atol=1e-3)


def test_a_reference_of_another_shape_is_refused(tmp_path) -> None:
    sim, _ = embedded(8)
    ids = text()[None, :LENGTH]
    for wrong in (ids[:, :5], ids.int(), ids.repeat(2, 1)):
        with pytest.raises(DataError, match="the files take one shape"):
            export(sim, ids, tmp_path / "out", reference=wrong)
    with pytest.raises(DataError, match="does not run"):
        export(sim, ids, tmp_path / "out", reference=ids + 10_000)
    assert not any(tmp_path.iterdir())


def test_the_shell_says_what_was_found_by_its_exit_code(folder, tmp_path, capsys) -> None:
    report, words = tmp_path / "report.json", tmp_path / "words.txt"
    words.write_text("def f(x):\n    return x\n" * 20)
    quick = ["--no-htp", "--eval-tokens", "100"]
    assert main(["verify", str(folder), *quick, "--text", str(words), "--json", str(report)]) == 0
    assert "no findings" in capsys.readouterr().out
    assert json.loads(report.read_text())["ok"]
    (folder / "config.json").write_text("{}")
    assert main(["verify", str(folder), *quick]) == 1
    assert "FINDING  files" in capsys.readouterr().out
    for arguments, message in [
        (["verify", str(tmp_path / "nowhere")], "no manifest.json"),
        (["verify", str(folder), "--htp-arch", "1"], "htp_arch is '1'"),
        (["verify", str(folder), "--text", str(tmp_path / "no.txt")], "no.txt"),
        (["compile", str(tmp_path)], "no manifest.json"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_next_step_fits_the_files() -> None:
    converted = "qairt-converter --input_network out/model.onnx --quantization_overrides "
    last = f"next: {converted}out/model.encodings --output_path model.dlc"
    assert next_steps(Path("out"), 22).splitlines()[-1] == last
    assert "reads opset 22, this is 23: run --opset 22" in next_steps(Path("out"), 23)


@pytest.mark.deploy
def test_the_shell_compiles(folder, capsys) -> None:
    assert main(["compile", str(folder), "--htp-arch", "75"]) == 0
    assert compiled_whole(capsys.readouterr().out, "operations on HTP v75")
    assert check_export(folder).ok


@pytest.mark.skipif(not AIMET_ONNX, reason="AIMET_ONNX_PYTHON names no Python with aimet-onnx")
@pytest.mark.parametrize("bits", [8, 16])
def test_aimet_onnx_loads_the_files_and_computes_the_same(bits) -> None:
    check = found(embedded(bits)[1], aimet_onnx=AIMET_ONNX)["aimet-onnx = sim"]
    assert check.ok, check.detail


def test_a_python_without_aimet_onnx_is_a_finding(folder) -> None:
    check = found(folder, aimet_onnx=shutil.which("python3"))["aimet-onnx = sim"]
    assert check.ok is False
    assert "No module named" in check.detail
    with pytest.raises(DataError, match="does not run"):
        found(folder, aimet_onnx="/nowhere/python")


def test_agreement_counts_ties_and_allows_for_few_positions() -> None:
    from aimet_quadapter.device.logit_differences import Difference

    expected = torch.tensor([[0.0, 1, 1], [2, 0, 1]])
    got = torch.tensor([[0.0, 0, 1], [1, 2, 0]])
    difference = Difference(step=1.0)
    difference.add(got, expected)
    assert (difference.agreement, difference.agreement_or_tie) == (0.0, 0.5)
    assert difference.mean == pytest.approx(np.mean([0, 1, 0, 1, 2, 1]))
    assert difference.largest == 2
