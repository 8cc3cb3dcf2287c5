"""The pass of Microsoft Olive, in a workflow that Olive runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from aimet_quadapter import DataError, UnsupportedModelError, load_default

pytest.importorskip("olive", reason="Olive is not installed: pip install '.[olive]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

QUICK = {"samples": 2, "length": 32, "eval_tokens": 64, "calibration": {"steps": 5}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Llama and the embedded model's tokenizer."""
    _, tokenizer = load_default()
    return tiny.saved(tiny.llama(vocab_size=len(tokenizer)), tmp_path_factory.mktemp("original"))


def config(**parameters: Any) -> Any:
    """The parameters of the pass, as Olive checks and completes them."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    from aimet_quadapter.integrations import Quadapter

    return Quadapter.generate_config(DEFAULT_CPU_ACCELERATOR, parameters, disable_search=True)


def run(workflow: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """`olive run` of a workflow, in a process of its own."""
    from aimet_quadapter.integrations import write_olive_packages

    packages = write_olive_packages(folder / "packages.json")
    file = folder / "workflow.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "CI": "1",  # Olive reports nothing to Microsoft then; OLIVE_DISABLE_TELEMETRY is too late
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "olive", "run", "--config", file, "--package-config", packages]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@torch.no_grad()
def test_olive_runs_the_pass_and_its_own_after_it(original: Path, tmp_path: Path) -> None:
    """Scales go in without changing the function; what Olive quantizes then is the scaled model."""
    parameters = {**QUICK, "bits": [8, 8], "residual_bits": 16, "rotate": "none"}
    scales = {"type": "Quadapter", "config": parameters}
    start = {"input_model": {"type": "HfModel", "model_path": str(original)}, "cache_dir": "cache"}
    done = run({**start, "passes": {"scales": scales}, "output_dir": "scaled"}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = {file.parent for file in (tmp_path / "scaled").rglob("config.json")}
    ids = tiny.tokens()
    before = AutoModelForCausalLM.from_pretrained(original)
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert type(after) is type(before)
    assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=1e-4)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(after.get_parameter(norm), before.get_parameter(norm))
    assert len(AutoTokenizer.from_pretrained(folder)) == len(
        AutoTokenizer.from_pretrained(original)
    )
    result = json.loads(next((tmp_path / "cache").rglob("result.json")).read_text("utf-8"))
    assert result["recipe"]["bits"] == [8, 8]
    assert result["recipe"]["residual_bits"] == 16
    assert result["recipe"]["prefix"] == "none"

    rounded = {"scales": scales, "rtn": {"type": "Rtn", "config": {"bits": 8, "group_size": -1}}}
    done = run({**start, "passes": rounded, "output_dir": "rounded"}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (tmp_path / "rounded").rglob("config.json")
    assert json.loads(found.read_text("utf-8"))["quantization_config"]


def test_parameters_are_the_settings_of_a_run(original: Path, tmp_path: Path) -> None:
    from aimet_quadapter.cli.settings import TIERS
    from aimet_quadapter.integrations.olive import settings_of

    asked = config(tier="fast", bits=[4, 16], calibration={"lr": 0.2}, compensate_softmax=True)
    settings = settings_of(asked, str(original), "gpu", tmp_path / "out")
    assert settings.bits == (4, 16)
    assert settings.samples == TIERS["fast"]["samples"]
    assert settings.calibration.steps == TIERS["fast"]["calibration"]["steps"]
    assert settings.calibration.lr == 0.2
    assert settings.compensate_softmax
    assert settings.device == "cuda"
    assert settings.prefix == "none"
    assert (settings.model, settings.save_huggingface, settings.export) == (
        str(original),
        True,
        False,
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("samples: 7\nseed: 3\nprefix: [1]\n", encoding="utf-8")
    settings = settings_of(config(recipe=str(recipe), seed=5), "m", None, tmp_path / "out")
    assert (settings.samples, settings.seed, settings.prefix) == (7, 5, "none")
    with pytest.raises(ValueError, match="greater than or equal to 4"):  # before Olive runs a pass
        config(bits=[3, 8])
    with pytest.raises(DataError, match="did you mean 'steps'"):
        settings_of(config(calibration={"stepps": 5}), "m", None, tmp_path / "out")


def test_what_would_be_read_as_another_model_is_refused(original: Path, tmp_path: Path) -> None:
    from olive.model import HfModelHandler, PyTorchModelHandler

    from aimet_quadapter.integrations.olive import refuse

    refuse(HfModelHandler(str(original), load_kwargs={"attn_implementation": "eager"}))
    with pytest.raises(UnsupportedModelError, match="PyTorchModelHandler: put it before"):
        refuse(PyTorchModelHandler(model_loader=lambda _: None))
    with pytest.raises(UnsupportedModelError, match="fold_adapter"):
        refuse(HfModelHandler(str(original), adapter_path=str(tmp_path)))
    with pytest.raises(UnsupportedModelError, match="loaded with trust_remote_code"):
        refuse(HfModelHandler(str(original), load_kwargs={"trust_remote_code": True}))


def test_olives_own_passes_stay_where_they_are(tmp_path: Path) -> None:
    from olive.package_config import OlivePackageConfig

    from aimet_quadapter.integrations import Quadapter, write_olive_packages
    from aimet_quadapter.integrations.olive import OWN_CONFIG

    theirs = OlivePackageConfig.load_default_config()
    merged = OlivePackageConfig.parse_file_or_obj(str(write_olive_packages(tmp_path / "p.json")))
    assert merged.passes.keys() == theirs.passes.keys() | {"quadapter"}
    assert merged.extra_dependencies == theirs.extra_dependencies
    alone = OlivePackageConfig.parse_file_or_obj(str(OWN_CONFIG))
    assert alone.import_pass_module("Quadapter") is Quadapter
