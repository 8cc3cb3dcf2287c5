"""LoRA adapters of an original on its folded checkpoint, made and loaded by `peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import gpt2, llama, simulate, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aimet_quadapter import (
    DataError,
    UnsupportedModelError,
    find_pairs,
    fold,
    fold_adapter,
    prepare,
    rotate,
    save_huggingface,
)


def adapter_of(hf: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Write a random adapter of all linears; the logits of base and adapter."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | settings)
    model = get_peft_model(hf, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        logits = model(tokens()).logits
    model.save_pretrained(folder, save_embedding_layers=False)
    model.unload()
    return logits


def folded(hf: Any, turned: bool) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A sim with random α folded in, its pairs and α."""
    prepared = prepare(hf)
    if turned:
        rotate(prepared, seed=3)
    sim = simulate(prepared)
    pairs = find_pairs(sim)
    generator = torch.Generator().manual_seed(0)
    alphas = {p.name: torch.rand(p.channels, generator=generator) * 4 + 0.2 for p in pairs}
    fold(sim, pairs, alphas)
    return sim, pairs, alphas


@pytest.mark.parametrize(
    ("name", "turned", "settings"),
    [
        ("llama", False, {}),
        ("llama", True, {}),
        ("qwen2", True, {"use_rslora": True}),
        ("phi3", True, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"qkv_proj": 9}}),
        ("gemma3", False, {}),
        ("gpt2", False, {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
        ("granite", True, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        ("gpt_neox", False, {}),
        ("llama", True, {"r": 40, "target_modules": ["k_proj", "up_proj"]}),  # k_proj is narrower
    ],
)
@torch.no_grad()
def test_an_adapter_computes_on_the_folded_base_what_it_did_on_the_original(
    name: str, turned: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    hf = families.model(name).eval()
    plain = hf(tokens()).logits
    expected = adapter_of(hf, tmp_path / "adapter", **settings)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    sim, pairs, alphas = folded(hf, turned)
    base = AutoModelForCausalLM.from_pretrained(save_huggingface(sim, hf, tmp_path / "base"))
    new = fold_adapter(tmp_path / "adapter", sim, hf, pairs, alphas, tmp_path / "new")
    got = PeftModel.from_pretrained(base, new).eval()(tokens()).logits
    assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    before, after = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "new")
    )
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    unfolded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    wrong = unfolded.eval()(tokens()).logits
    assert (wrong - expected).abs().max() > 1e-2 * expected.abs().max()  # it has to be folded


@torch.no_grad()
def test_an_update_is_not_run_as_if_it_were_weights(tmp_path: Path) -> None:
    """In the place of W, B A makes a model of noise; its logits say nothing about the adapter."""
    hf = llama()
    for layer in hf.model.layers:  # a weight that reads nothing; of its size B A would overflow
        layer.input_layernorm.weight[0] = 0.0
        layer.self_attn.q_proj.weight[0, 0] = layer.self_attn.k_proj.weight[0, 0] = 1e30
    expected = adapter_of(hf, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    sim, pairs, alphas = folded(hf, True)
    base = AutoModelForCausalLM.from_pretrained(save_huggingface(sim, hf, tmp_path / "base"))
    new = fold_adapter(tmp_path / "adapter", sim, hf, pairs, alphas, tmp_path / "new")
    got = PeftModel.from_pretrained(base, new).eval()(tokens()).logits
    assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_what_an_adapter_does_not_follow_is_found_before_its_folder_appears(tmp_path: Path) -> None:
    """Weights that training moved, and α that another sim has."""
    hf = llama()
    adapter_of(hf, tmp_path / "adapter")
    sim, pairs, alphas = folded(hf, False)
    other = {name: alpha * 1.5 for name, alpha in alphas.items()}
    with pytest.raises(UnsupportedModelError, match="computes other logits on the folded base"):
        fold_adapter(tmp_path / "adapter", sim, hf, pairs, other, tmp_path / "new")
    sim.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.2)
    with pytest.raises(UnsupportedModelError, match="computes other logits on the folded base"):
        fold_adapter(tmp_path / "adapter", sim, hf, pairs, alphas, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_an_adapter_in_half_precision_stays_so(tmp_path: Path) -> None:
    hf = llama()
    expected = adapter_of(hf, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: x.bfloat16() for n, x in load_file(file).items()}, file)
    sim, pairs, alphas = folded(hf, False)
    base = AutoModelForCausalLM.from_pretrained(save_huggingface(sim, hf, tmp_path / "base"))
    new = fold_adapter(tmp_path / "adapter", sim, hf, pairs, alphas, tmp_path / "new")
    kinds = {x.dtype for x in load_file(new / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16}
    got = PeftModel.from_pretrained(base, new).eval()(tokens()).logits
    assert_close(got, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@torch.no_grad()
def test_an_adapter_that_was_never_trained_stays_nothing(tmp_path: Path) -> None:
    hf = llama()
    get_peft_model(hf, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    hf = llama()
    sim, pairs, alphas = folded(hf, True)
    new = fold_adapter(tmp_path / "adapter", sim, hf, pairs, alphas, tmp_path / "new")
    weights = load_file(new / "adapter_model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    a, b = (next(w for n, w in weights.items() if f"lora_{x}" in n) for x in "AB")
    assert (b @ a).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"peft_type": "IA3"}, DataError, "is a IA3 adapter; only LoRA"),
        ({"use_dora": True}, UnsupportedModelError, "use_dora: DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save: it brings"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModelError, "Save it as plain LoRA"),
        ({"init_lora_weights": "olora"}, UnsupportedModelError, "init_lora_weights='olora'"),
        ({"bias": "all"}, UnsupportedModelError, "bias='all'"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    hf = llama()
    adapter_of(hf, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(error, match=said):
        fold_adapter(tmp_path / "adapter", *folded_for(hf), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def folded_for(hf: Any) -> tuple[Any, ...]:
    sim, pairs, alphas = folded(hf, False)
    return sim, hf, pairs, alphas


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    hf = llama()
    with pytest.raises(DataError, match=r"has no adapter_config\.json and no adapter_model"):
        fold_adapter(tmp_path, *folded_for(hf), tmp_path / "new")
    adapter_of(gpt2(), tmp_path / "gpt2", target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(DataError, match=r"changes transformer.h.0.mlp.c_fc, which is none of its"):
        fold_adapter(tmp_path / "gpt2", *folded_for(hf), tmp_path / "new")
    adapter_of(llama(intermediate_size=40), tmp_path / "wide", target_modules=["up_proj"])
    with pytest.raises(DataError, match=r"update of .*up_proj is \(40, .* it is of another model"):
        fold_adapter(tmp_path / "wide", *folded_for(hf), tmp_path / "new")
    adapter_of(hf, tmp_path / "more", target_modules=["q_proj"])
    file = tmp_path / "more" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.x.lora_magnitude": torch.ones(2)}, file)
    with pytest.raises(UnsupportedModelError, match=r"holds base_model\.model\.x\.lora_magnitude"):
        fold_adapter(tmp_path / "more", *folded_for(hf), tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").touch()
    with pytest.raises(FileExistsError):
        fold_adapter(tmp_path / "more", *folded_for(hf), tmp_path / "new")
