"""Settings of `quadapter run`: a recipe's file, flags over it, tiers below it, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimet_quadapter import CalibrationConfig, DataError, FinetuneConfig
from aimet_quadapter.cli import main
from aimet_quadapter.cli.settings import TIERS, Settings, as_yaml, resolve


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_lie_over_the_file_that_lies_over_the_tier_that_lies_over_the_defaults(
    tmp_path: Path,
) -> None:
    file = recipe(
        tmp_path, "tier: fast\nbits: [4, 16]\nprefix: none\ncalibration: {lr: 0.1}\nseed: 7\n"
    )
    settings = resolve({"bits": ["8", "16"], "calibration": {"decay": 0.9}}, file)
    assert settings.bits == (8, 16)
    assert settings.prefix == "none"
    expected = CalibrationConfig(steps=20, lr=0.1, decay=0.9, seed=7)  # 20 steps: the tier's
    assert settings.calibration == expected
    assert (settings.samples, settings.eval_tokens) == (4, 8192)


def test_a_tier_that_is_asked_for_lies_over_the_file(tmp_path: Path) -> None:
    file = recipe(tmp_path, as_yaml(resolve({"tier": "fast", "seed": 5})))  # holds every setting
    settings = resolve({"tier": "best", "samples": 3}, file)
    assert settings.samples == 3
    assert settings.phase_2
    assert (settings.calibration.choice, settings.calibration.seed) == ("layer", 5)
    assert resolve({}, file).calibration.steps == 20
    best = recipe(tmp_path, as_yaml(resolve({"tier": "best", "eval_tokens": 77})))
    assert resolve({"tier": "default"}, best) == resolve({"eval_tokens": 77})
    assert resolve({"tier": "fast"}, best) == resolve({"tier": "fast", "eval_tokens": 77})


def test_a_flag_over_a_recipe_with_every_setting_takes_along_what_follows_from_it(
    tmp_path: Path,
) -> None:
    file = recipe(tmp_path, as_yaml(resolve({"calibration": {"seed": 9}})))
    assert resolve({}, file).calibration.seed == 9
    again = resolve({"seed": 1}, file)
    assert (again.seed, again.calibration.seed) == (1, 1)
    assert resolve({"seed": 1, "calibration": {"seed": 2}}, file).calibration.seed == 2
    with_text = resolve({"finetune_text": ["built-in"]}, file)
    assert with_text.phase_2
    without = resolve({"phase_2": False}, recipe(tmp_path, as_yaml(with_text)))
    assert (without.phase_2, without.finetune_text) == (False, None)


def test_the_defaults_are_those_of_the_functions() -> None:
    settings = resolve({})
    assert settings == Settings()
    assert settings.calibration == CalibrationConfig()
    assert settings.finetuning == FinetuneConfig()
    paper = resolve({"tier": "paper", "seed": 2})
    assert paper.calibration == CalibrationConfig.paper(seed=2)
    assert paper.finetuning == FinetuneConfig.paper()


@pytest.mark.parametrize("tier", TIERS)
def test_what_print_recipe_prints_is_the_same_run(
    tier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "./model", "--tier", tier, "--prefix", "5", "9", "--no-bos", "--steps", "3"]
    assert main([*given, "--print-recipe"]) == 0
    printed = capsys.readouterr().out
    assert set(yaml.safe_load(printed)) == set(Settings.model_fields)
    file = recipe(tmp_path, printed)
    again = resolve({}, file)
    assert as_yaml(again) == printed
    assert (again.model, again.prefix, again.bos) == ("./model", [5, 9], False)
    assert again.calibration.steps == 3
    assert resolve({}, recipe(tmp_path, json.dumps(yaml.safe_load(printed)), "r.json")) == again
    assert resolve({}, recipe(tmp_path, "recipe:\n  seed: 4\nperplexity: 3\n")).seed == 4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sampels": 3}, "no setting is called 'sampels': did you mean 'samples'?"),
        ({"quux": 3}, "no setting is called 'quux': there are model, tier,"),
        ({"calibration": {"stepz": 3}}, "calibration has no setting 'stepz': did you mean 'steps'"),
        ({"samples": 0}, "samples is 0: Input should be greater than or equal to 1"),
        ({"samples": "many"}, "samples is 'many': Input should be a valid integer"),
        ({"bits": [3, 8]}, "bits.0 is 3: Input should be greater than or equal to 4"),
        ({"tier": "quick"}, "tier is 'quick': Input should be 'fast', 'default', 'best' or"),
        ({"tier": ["fast"]}, "tier is ['fast']"),
        ({"opset": 9}, "opset is 9: Input should be 21, 22 or 23"),
        ({"prefix": ["auto", "5"]}, "prefix is ['auto', '5']: pass token ids, or auto or none"),
        ({"calibration": {"steps": -1}}, "calibration: steps is -1; expected 0 or more."),
        ({"calibration": {"lr": "fast"}}, "calibration.lr is 'fast': Input should be a valid numb"),
        ({"calibration": 3}, "calibration is 3: Input should be a dictionary or an instance of"),
        ({"finetuning": {"loss": "mse"}}, "finetuning: loss is 'mse'; expected one of"),
        ({"evaluation_text": []}, "evaluation_text is []: List should have at least 1 item"),
        ({"compensate_softmax": True, "samples": 1}, "compensate_softmax needs samples of 2"),
        ({"finetune_text": ["a"], "phase_2": False}, "finetune_text is the text of phase 2, and"),
    ],
)
def test_what_no_setting_has_is_refused_in_one_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as refused:
        resolve(asked)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (
        ("a: [", "is not YAML or JSON"),
        ("3", "holds no settings"),
        ("", "holds no settings"),
        ("residual_bit: 16", "recipe.yaml: no setting is called 'residual_bit': did you mean"),
    ):
        file = recipe(tmp_path, text)
        assert main(["run", "--recipe", str(file)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["run", "--recipe", str(tmp_path / "binary.yaml")]) == 2
    assert "binary.yaml is not YAML or JSON" in capsys.readouterr().err
    assert main(["run", "--calibration", "steps=["]) == 2
    assert "'[' is no value in YAML" in capsys.readouterr().err
    assert main(["run", "--recipe", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["run", "--calibration", "steps"]) == 2
    assert "--calibration steps: give KEY=VALUE" in capsys.readouterr().err


def test_no_token_is_no_prefix() -> None:
    assert resolve({"prefix": []}).prefix == "none"


def test_a_text_of_phase_2_asks_for_phase_2() -> None:
    assert resolve({"finetune_text": ["built-in"]}).phase_2
    assert not resolve({}).phase_2
    assert resolve({"tier": "best"}).finetuning.loss == "distillation"
