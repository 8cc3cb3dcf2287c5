"""Weights that go back into HuggingFace's own class."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from tiny import decoder_sim, gpt2, llama, tokens
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aimet_quadapter import (
    DataError,
    LogitsOnly,
    SimError,
    UnfoldedError,
    UnsupportedModelError,
    attach,
    compensate_softmax,
    find_pairs,
    fold,
    save_huggingface,
    set_prefix,
    set_ranges,
)


def scaled(hf: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The sim of a model, α folded into all of its pairs, and α."""
    sim = decoder_sim(hf)
    pairs = find_pairs(sim)
    generator = torch.Generator().manual_seed(0)
    alphas = {p.name: torch.rand(p.channels, generator=generator) * 4 + 0.2 for p in pairs}
    fold(sim, pairs, alphas)
    return sim, alphas


@pytest.mark.parametrize("name", [*families.FAMILIES, "llama-tied", "gpt2-untied", "opt-350m"])
@torch.no_grad()
def test_a_checkpoint_loads_as_its_own_class_and_computes_the_same(
    name: str, tmp_path: Path
) -> None:
    hf = families.model(name)
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    sim, _ = scaled(hf)
    folder = save_huggingface(sim, hf, tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(hf)
    expected = hf(tokens()).logits
    assert_close(loaded(tokens()).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    weights = dict(loaded.named_parameters())
    assert any(not torch.equal(p, weights[n]) for n, p in hf.named_parameters())
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert all(torch.equal(v, before[k]) for k, v in hf.state_dict().items())


@torch.no_grad()
def test_a_half_precision_model_comes_back_in_its_type(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "original")  # `.to` would round rotary frequencies too
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    sim, _ = scaled(hf)
    loaded = AutoModelForCausalLM.from_pretrained(save_huggingface(sim, hf, tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    for name, parameter in sim.model.named_parameters():
        if "_quantizers" not in name:
            assert torch.equal(parameter, loaded.get_parameter(name))


def test_what_has_no_place_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    hf = llama()
    sim = decoder_sim(hf)
    target = tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel, the sim is of a Llama"):
        save_huggingface(sim, gpt2(), target)
    with pytest.raises(SimError, match="expected the sim of a prepared model, got Linear"):
        save_huggingface(nn.Linear(2, 2), hf, target)
    with pytest.raises(DataError, match="save_pretrained"):
        save_huggingface(sim, hf, target, tokenizer="llama")
    pairs = find_pairs(sim)
    attached = copy.deepcopy(sim)
    attach(attached, pairs, {p.name: torch.ones(p.channels) for p in pairs})
    with pytest.raises(UnfoldedError, match="Fold it"):
        save_huggingface(attached, hf, target)
    batches = [tokens(1, 16, seed) for seed in range(3)]
    mistral = families.model("mistral")
    shifted = decoder_sim(mistral)
    set_ranges(shifted, batches)
    compensate_softmax(shifted, batches)
    with pytest.raises(UnsupportedModelError, match=r"no place for .*bias: save the .* before"):
        save_huggingface(shifted, mistral, target)
    with pytest.raises(ValueError, match="perplexity 'PTQ' is 0"):
        save_huggingface(sim, hf, target, perplexities={"PTQ": 0})
    other = llama(hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="first module that differs"):
        save_huggingface(decoder_sim(hf), other, target)
    assert not any(tmp_path.iterdir())


@torch.no_grad()
def test_biases_of_the_softmax_are_those_of_attention_bias(tmp_path: Path) -> None:
    hf = llama()
    sim, _ = scaled(hf)
    batches = [tokens(1, 16, seed) for seed in range(3)]
    set_ranges(sim, batches)
    compensate_softmax(sim, batches)
    for module in sim.model.modules():  # of a random model nothing is worth a shift
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.add_(torch.randn(module.bias.shape) * 0.1)
    folder = save_huggingface(sim, hf, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.attention_bias
    assert not hf.config.attention_bias
    with remove_all_quantizers(sim.model):
        expected = sim.model(tokens())
    assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.get_parameter("model.layers.0.self_attn.q_proj.bias").count_nonzero() == 0
    assert loaded.get_parameter("model.layers.0.self_attn.v_proj.bias").count_nonzero() > 0


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    hf = llama()
    hf.name_or_path = "someone/tiny-llama"
    sim, alphas = scaled(hf)
    set_prefix(sim.model, [5, 9])
    set_ranges(sim, [tokens()])
    about = {"perplexities": {"FP32": 12.3456}, "notes": "## Settings\n\nseed 3"}
    folder = save_huggingface(sim, hf, tmp_path / "out", pairs=list(alphas), **about)
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "someone/tiny-llama"
    for said in (
        "# tiny-llama, its channels scaled",
        "`LlamaForCausalLM`",
        f"were scaled: {len(alphas)}",
        "behind the tokens [5, 9]",
        "weights 8 bits",
        "| FP32 | 12.346 |",
        "seed 3",
        "aimet-torch",
    ):
        assert said in body
    local = save_huggingface(sim, _at(hf, tmp_path / "model"), tmp_path / "second")
    card = (local / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in card
    assert str(tmp_path) not in card


def _at(hf: Any, folder: Path) -> Any:
    hf.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("stock", [False, True], ids=["prepared", "stock"])
@torch.no_grad()
def test_quantizing_the_checkpoint_is_quantizing_what_alpha_was_folded_into(
    stock: bool, tmp_path: Path
) -> None:
    batches = [tokens(1, 16, seed) for seed in range(3)]
    hf = llama()
    sim, alphas = scaled(hf)
    loaded = AutoModelForCausalLM.from_pretrained(save_huggingface(sim, hf, tmp_path / "out"))
    again = decoder_sim(loaded)
    if stock:  # HuggingFace's own modules: the same α on its original
        again, sim = (
            QuantizationSimModel(LogitsOnly(model.eval()), tokens()) for model in (loaded, hf)
        )
        found = find_pairs(sim, tokens())
        fold(sim, found, dict(zip((p.name for p in found), alphas.values(), strict=True)))
    for one in (sim, again):
        set_ranges(one, batches)
    expected, got = (one.model(batches[0]) for one in (sim, again))
    assert_close(got, expected, rtol=0, atol=0)
