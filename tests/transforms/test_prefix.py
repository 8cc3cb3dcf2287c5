"""A prefix: the logits of text behind these tokens, in every family and at every stage."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from deployed import check_same_but_for_rounding, steps
from tiny import FAST, llama, simulate, tokens
from torch import Tensor
from torch.testing import assert_close

from aimet_quadapter import (
    DataError,
    FinetuneConfig,
    Generator,
    SimError,
    UnfoldedError,
    UnsupportedModelError,
    apply_quadapter,
    attach,
    compensate_softmax,
    coverage,
    detach,
    export,
    export_generation,
    find_pairs,
    finetune,
    fold,
    generate_on_cpu,
    perplexity,
    prepare,
    rotate,
    run_on_cpu,
    save_huggingface,
    set_prefix,
    set_ranges,
    weights_restored,
)

PREFIX = torch.tensor([5, 9])
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in families.VARIANTS]


def behind(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of ids behind the prefix, sent as tokens."""
    first = PREFIX.expand(len(ids), -1)
    whole = torch.cat((first, ids), 1)
    if mask is not None:
        mask = torch.cat((torch.ones_like(first), mask), 1)
    with model.without_prefix(), torch.no_grad():
        logits: Tensor = model(whole, mask)[:, len(PREFIX) :]
    return logits


@pytest.mark.parametrize("name", [*families.FAMILIES, *SLOW])
@torch.no_grad()
def test_logits_are_those_of_text_behind_the_tokens(name: str) -> None:
    model = prepare(families.model(name))
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    plain = model(ids)
    set_prefix(model, PREFIX)
    assert model.prefix == (5, 9)
    assert_close(model(ids), behind(model, ids), rtol=1e-4, atol=1e-4)
    seen = mask[..., None].bool()
    got, expected = model(ids, mask), behind(model, ids, mask)
    assert_close(got.where(seen, 0.0), expected.where(seen, 0.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, model(ids), atol=1e-3)
    set_prefix(model, [])
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_a_given_mask_may_know_the_prefix_or_not() -> None:
    model = prepare(llama())
    set_prefix(model, PREFIX)
    ids = tokens(1, 6)
    causal = torch.ones(6, 6).tril().bool()[None, None]
    assert_close(model(ids, causal), model(ids))
    wider = torch.nn.functional.pad(causal, (2, 0), value=True)
    assert_close(model(ids, wider), model(ids))


def test_generate_begins_behind_the_prefix() -> None:
    model = prepare(llama())
    ids = tokens(1, 7)
    expected = model.generate(torch.cat((PREFIX[None], ids), 1), max_new_tokens=5, do_sample=False)
    set_prefix(model, PREFIX)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected[:, 2:])


def test_constants_have_the_encoding_of_what_they_stand_beside_and_count_in_it() -> None:
    model = prepare(llama())
    set_prefix(model, PREFIX)
    attention = model.model.layers[0].self_attn
    attention.prefix_key.constant.data[..., 0] = 100.0  # beyond every key of a text
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73")
    set_ranges(sim, [tokens(1, 12)])
    inside = sim.model.model.layers[0].self_attn
    quantizer = inside.rotary_k.add.output_quantizers[0]
    assert quantizer.get_max().item() == pytest.approx(100.0, rel=0.05)
    keys: list[Tensor] = []
    handle = inside.prefix_key.register_forward_hook(lambda *x: keys.append(x[2]))
    sim.model(tokens(1, 3))
    handle.remove()
    steps = keys[0] / quantizer.get_scale()
    assert_close(steps, steps.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("build", [llama, families.FAMILIES["gpt2"], families.FAMILIES["qwen2"]])
def test_every_pair_is_still_found_and_scales_the_constants(build: Any) -> None:
    plain = find_pairs(simulate(prepare(build())))
    model = prepare(build())
    set_prefix(model, PREFIX)
    sim = simulate(model)
    pairs = find_pairs(sim)
    assert pairs.counts() == plain.counts()
    for pair in pairs.select("v-o"):
        scaled = [s.module for s in pair.scales if s.parameter == "constant"]
        assert [name.rpartition(".")[2] for name in scaled] == ["prefix_value"]
    ids = tokens(2, 9)
    with torch.no_grad(), remove_all_quantizers(sim.model):
        before = sim.model(ids)
        with weights_restored(sim, pairs):
            fold(sim, pairs, {p.name: torch.rand(p.channels) + 0.5 for p in pairs})
            assert_close(sim.model(ids), before, rtol=1e-4, atol=1e-4)
        assert torch.equal(sim.model(ids), before)


def deployable(rotated: bool = False) -> Any:
    """A sim behind a prefix, all stages done."""
    model = prepare(llama())
    set_prefix(model, PREFIX)
    if rotated:
        rotate(model)
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73")
    samples = [tokens(1, 16, seed) for seed in range(3)]
    with torch.no_grad(), remove_all_quantizers(sim.model):
        before = sim.model(samples[0])
    apply_quadapter(sim, samples, calibration=FAST)
    compensate_softmax(sim, samples)
    with torch.no_grad(), remove_all_quantizers(sim.model):
        assert_close(sim.model(samples[0]), before, rtol=1e-3, atol=1e-3)
    assert not coverage(sim).missing
    return sim


def test_the_exported_file_computes_what_the_sim_does(tmp_path: Path) -> None:
    sim = deployable(rotated=True)
    folder = export(sim, sim.model.dummy_input(length=16), tmp_path / "export")
    ids = tokens(1, 16, 7)
    check_same_but_for_rounding(steps(run_on_cpu(folder, ids), sim, ids))


def test_generated_tokens_are_the_sims(tmp_path: Path) -> None:
    sim = deployable()
    folder = export_generation(sim, tmp_path / "graphs", prompt_length=8, cache_length=24)
    prompt = tokens(1, 5, 3)
    expected = sim.model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 5:]
    assert list(generate_on_cpu(folder, prompt, 8).ids) == expected.tolist()
    with pytest.raises(DataError, match="room for"):
        generate_on_cpu(folder, prompt, 19)  # 24 places, 2 of them the prefix's
    with pytest.raises(ValueError, match="behind a prefix of 2"):
        export_generation(sim, tmp_path / "x", prompt_length=8, cache_length=10)


def test_a_prompt_that_is_text_does_not_say_the_prefix_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_generation(deployable(), tmp_path / "g", prompt_length=8, cache_length=24)
    generator = Generator.on_cpu(folder)
    monkeypatch.setattr(generator, "_has_tokenizer", lambda: True)
    said = {"with it": [5, 9, 3, 4], "without": [3, 4]}
    monkeypatch.setattr(
        generator, "_load_tokenizer", lambda: lambda text: {"input_ids": said[text]}
    )
    module = importlib.import_module("aimet_quadapter.device.generator")
    monkeypatch.setattr(module, "prompt_prefix", lambda _: torch.tensor([5]))
    assert generator._tokens("with it") == [9, 3, 4]  # a BOS of 5; the 9 is the text's
    assert generator._tokens("without") == [3, 4]
    assert generator._tokens([5, 9, 3, 4]) == [5, 9, 3, 4]
    monkeypatch.setattr(module, "prompt_prefix", lambda _: torch.tensor([], dtype=torch.long))
    assert generator._tokens("with it") == [5, 9, 3, 4]


def test_a_checkpoint_for_huggingface_is_written_without_it(tmp_path: Path) -> None:
    hf = llama()
    model = prepare(hf)
    set_prefix(model, PREFIX)
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73")
    apply_quadapter(sim, [tokens(1, 16)], calibration=FAST)
    folder = save_huggingface(sim, hf, tmp_path / "checkpoint")
    loaded = type(hf).from_pretrained(folder)
    ids = tokens(1, 9)
    with torch.no_grad():
        with remove_all_quantizers(sim.model):
            expected = behind(sim.model, ids)
        got = loaded(torch.cat((PREFIX[None], ids), 1)).logits[:, 2:]
    assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_what_is_no_prefix_is_refused() -> None:
    model = prepare(llama())
    with pytest.raises(UnsupportedModelError, match="prepared model"):
        set_prefix(llama(), PREFIX)
    with pytest.raises(DataError, match="the model knows 0 … 95"):
        set_prefix(model, [96])
    with pytest.raises(DataError, match="64 positions"):
        set_prefix(model, [1] * 64)
    with pytest.raises(DataError):
        set_prefix(model, torch.tensor([0.5]))
    assert model.prefix == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    model = prepare(llama().to(dtype))
    set_prefix(model, PREFIX)
    constants = [p for n, p in model.named_parameters() if n.endswith("constant")]
    assert len(constants) == 4
    assert {p.dtype for p in constants} == {dtype}
    ids = tokens(1, 9)
    with torch.no_grad():
        got, expected = model(ids).float(), behind(model, ids).float()
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()


def test_weights_with_nan_are_refused() -> None:
    model = prepare(llama())
    with torch.no_grad():
        model.lm_head.weight[1, 2] = float("nan")
    with pytest.raises(SimError, match="NaN or inf"):
        set_prefix(model, PREFIX)
    assert model.prefix == ()


def test_pairs_that_do_not_know_the_prefix_are_refused() -> None:
    sim = simulate(prepare(llama()))
    old = find_pairs(sim)
    alphas = {p.name: torch.full((p.channels,), 1.5) for p in old}
    attach(sim, old, alphas)
    with pytest.raises(UnfoldedError, match="fold"):
        set_prefix(sim.model, PREFIX)
    detach(sim)
    set_prefix(sim.model, PREFIX)
    with pytest.raises(ValueError, match="Find the pairs again"):
        fold(sim, old, alphas)
    fold(sim, old.select("up-down"), alphas)
    fold(sim, find_pairs(sim), alphas)


def test_quantization_aware_training_leaves_the_constants_alone() -> None:
    model = prepare(llama())
    set_prefix(model, PREFIX)
    sim = simulate(model)
    set_ranges(sim, [tokens()])
    before = {n: p.clone() for n, p in sim.model.named_parameters() if n.endswith("constant")}
    config = FinetuneConfig.qat(steps=2, lr_weights=1e-2)
    finetune(sim, [tokens()], (), config=config)
    after = dict(sim.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert len(before) == 4


def test_positions_that_the_prefix_takes_are_not_there_for_a_text() -> None:
    model = prepare(llama())
    set_prefix(model, PREFIX)
    ids = tokens(1, 200)
    perplexity(model, ids, window=62, progress=False)
    with pytest.raises(DataError, match="64 positions"):
        perplexity(model, ids, window=63, progress=False)
