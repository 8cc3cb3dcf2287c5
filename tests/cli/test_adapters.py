"""`quadapter fold MODEL --adapter LORA`, its result loaded by transformers and peft."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import gpt2, llama, saved
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from aimet_quadapter import load_default
from aimet_quadapter.cli import main
from aimet_quadapter.cli.arguments import add_settings, settings_of

QUICK = ["--samples", "2", "--length", "32", "--eval-tokens", "128", "--steps", "3"]
QUICK += ["--no-report", "--device", "cpu"]
ALONE = [*QUICK, "--no-preflight"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that reads the embedded model's tokens."""
    hf = llama(2, vocab_size=len(load_default()[1]), max_position_embeddings=256)
    hf.generation_config = GenerationConfig()
    return saved(hf, tmp_path_factory.mktemp("model") / "my-llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(model, tmp_path_factory.mktemp("adapters") / "my-lora")


def lora(base: Path, folder: Path, **settings: Any) -> Path:
    """A random adapter of a base, as peft saves it."""
    hf = AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(hf, LoraConfig(**config | settings))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None) -> Tensor:
    """As a user of transformers and peft has them."""
    loaded = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    return loaded.eval()(ids).logits


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_the_adapter_of_one_command_computes_on_its_base_what_it_did(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind a rotation and both phases; the config names the folded base, not the original."""
    second = lora(model, tmp_path / "other", r=2, target_modules=["q_proj", "v_proj"], revision="x")
    target = tmp_path / "folded"
    command = ["fold", str(model), *QUICK, "--rotate", "hadamard", "--phase-2"]
    command += ["--finetune-steps", "3", "--finetuning", "lr_alpha=0.3", "-o", str(target)]
    assert main([*command, "--adapter", str(adapter), "--adapter", str(second)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        *("folded", "folded.adapters", "folded.run", "other"),
    ]
    printed = capsys.readouterr().out
    for source in (adapter, second):
        new = tmp_path / "folded.adapters" / source.name
        assert f"LoRA adapter: {new}" in printed
        expected, got = logits(model, source), logits(target, new)
        assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert apart(expected, logits(model)) > 1e-2  # it does something,
        assert apart(logits(target, source), expected) > 1e-2  # and has to be folded
        loaded = AutoPeftModelForCausalLM.from_pretrained(new)
        assert torch.equal(loaded.lm_head.weight, load_head(target))
        config = json.loads((new / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == str(target)
        assert config["revision"] is None
    assert_close(logits(target), logits(model), rtol=1e-4, atol=1e-4)
    result = json.loads((tmp_path / "folded.run" / "result.json").read_text(encoding="utf-8"))
    assert result["recipe"]["adapter"] == [str(adapter), str(second)]
    assert result["estimated"]["seconds"].keys() | {"load", "preflight"} == result["seconds"].keys()
    card = (target / "README.md").read_text(encoding="utf-8")
    assert str(adapter) not in card
    assert "- my-lora" in card


def load_head(base: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(base).lm_head.weight


def test_run_writes_them_too(model: Path, adapter: Path, tmp_path: Path) -> None:
    command = ["run", str(model), *ALONE, "--no-export", "--output", str(tmp_path / "out")]
    assert main([*command, "--save-huggingface", "--adapter", str(adapter)]) == 0
    new = tmp_path / "out" / "huggingface.adapters" / "my-lora"
    expected = logits(model, adapter)
    got = logits(tmp_path / "out" / "huggingface", new)
    assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    size = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    result = tmp_path / "out" / "result.json"
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["disk_bytes"] == size - result.stat().st_size


def test_what_cannot_be_written_is_refused_before_any_work(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = saved(llama(1, vocab_size=len(load_default()[1]), hidden_size=48), tmp_path / "wide")
    other = lora(wide, tmp_path / "of-another", target_modules=["q_proj"])
    foreign = saved(gpt2(vocab_size=len(load_default()[1])), tmp_path / "gpt2")
    of_gpt2 = lora(foreign, tmp_path / "of-gpt2", target_modules=["c_fc"], fan_in_fan_out=True)
    dora = lora(model, tmp_path / "dora", use_dora=True)
    same = lora(model, tmp_path / "again" / "my-lora")
    short = lora(model, tmp_path / "short")
    (short / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    target = tmp_path / "folded"
    command = ["fold", str(model), *ALONE, "-o", str(target)]
    before = sorted(tmp_path.rglob("*"))
    for given, said in (
        ([tmp_path / "nowhere"], "has no adapter_config.json and no adapter_model.safetensors"),
        ([model], "has no adapter_config.json"),
        ([other], "the adapter's update of model.layers.0.self_attn.q_proj is (48, 48)"),
        ([of_gpt2], "c_fc, which is none of its modules: it is of another model"),
        ([dora], "use_dora: DoRA's magnitudes"),
        ([short], "cannot be read"),
        ([adapter, same], "two adapters are called my-lora"),
        ([adapter, "--compensate-softmax"], "o_proj: compensate_softmax takes a shift"),
        ([adapter, "--phase-2", "--finetuning", "lr_weights=0.1"], "lr_weights trains others"),
    ):
        assert main([*command, "--adapter", *map(str, given)]) == 2, given
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "folded.adapters" / "my-lora").mkdir(parents=True)
    (tmp_path / "folded.adapters" / "my-lora" / "thesis.txt").touch()
    assert main([*command, "--adapter", str(adapter)]) == 2
    assert "my-lora is not empty" in capsys.readouterr().err
    assert not target.exists()
    run = ["run", str(model), *ALONE, "--output", str(tmp_path / "out")]
    assert main([*run, "--adapter", str(adapter)]) == 2
    assert "save_huggingface is false" in capsys.readouterr().err


def test_without_peft_the_extra_is_named(
    model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peft")
    command = ["fold", str(model), *ALONE, "-o", str(tmp_path / "folded")]
    assert main([*command, "--adapter", str(adapter)]) == 2
    printed = capsys.readouterr()
    assert "peft is not installed" in printed.err
    assert "pip install 'aimet_quadapter[lora]'" in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_besides_the_output_projection_fits_behind_the_softmax(
    model: Path, tmp_path: Path
) -> None:
    """What is refused for `o_proj` is exact for the others: values and all behind them."""
    names = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    adapter = lora(model, tmp_path / "my-lora", target_modules=names)
    target = tmp_path / "folded"
    command = ["fold", str(model), *ALONE, "--compensate-softmax", "-o", str(target)]
    assert main([*command, "--adapter", str(adapter)]) == 0
    expected = logits(model, adapter)
    got = logits(target, tmp_path / "folded.adapters" / "my-lora")
    assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_checkpoint_of_a_recipe_can_be_left_out(tmp_path: Path) -> None:
    import argparse

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save_huggingface: true\nadapter: [my-lora]\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_settings(parser)
    for flags, expected in (([], ["my-lora"]), (["--no-save-huggingface"], None)):
        args = parser.parse_args(["--recipe", str(recipe), *flags])
        del args.dry_run, args.no_preflight
        found = settings_of(args)
        assert found is not None
        assert found.adapter == expected
