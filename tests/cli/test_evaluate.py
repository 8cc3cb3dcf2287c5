"""`quadapter eval`: the shell's part; the scores are in tests/evaluation/test_tasks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployed import embedded
from task_files import write_tasks

from aimet_quadapter import load_default
from aimet_quadapter.artifacts.manifest import FORMAT
from aimet_quadapter.cli import main

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model as HuggingFace keeps one."""
    for part in load_default():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_export_beside_the_model_it_was_made_of(
    tasks: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    common = ["--task-dir", str(tasks), "--limit", "3", "--batch-size", "2"]
    output = ["--output", str(tmp_path / "scores.json")]
    command = ["eval", str(embedded(8)[1]), "--tasks", "choice,write", *common, *output]
    assert main([*command, "--reference", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "flips" in printed
    found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert {score["task"] for score in found["scores"]} == {"choice", "write"}
    assert found["window"] == 64
    assert found["limit"] == 3
    assert found["divergences"]["choice"]["mean"] > 0


def test_a_model_alone(tasks: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(folder), "--tasks", "choice", "--task-dir", str(tasks)]
    assert main([*command, "--num-fewshot", "0"]) == 0
    assert "flips" not in capsys.readouterr().out


def test_wrong_input_is_one_line(
    tasks: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folder), "--tasks", "chose", "--task-dir", str(tasks)]) == 2
    assert "there is no task 'chose'" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "kind": "generation"}))
    assert main(["eval", str(tmp_path), "--tasks", "choice"]) == 2
    assert "pass the folder of export" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    assert main(["eval", str(tmp_path), "--tasks", "choice"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
