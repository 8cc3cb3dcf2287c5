"""`compensate_softmax`: what it leaves as it is, what it makes better, and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import remove_all_quantizers
from deployed import ROUNDING, check_same_but_for_rounding, steps
from tiny import (
    VOCAB,
    assert_same,
    batches,
    copied,
    decoder_sim,
    gpt2,
    llama,
    logits,
    state,
    tokens,
)
from torch import Tensor

from aimet_quadapter import (
    DataError,
    SimError,
    UnfoldedError,
    attach,
    compensate_softmax,
    coverage,
    export,
    export_generation,
    find_pairs,
    fold,
    generate_on_cpu,
    keep_module_sites,
    set_ranges,
    weights_restored,
)
from aimet_quadapter.device.sessions import run_on_cpu
from aimet_quadapter.precision import softmax as implementation
from aimet_quadapter.precision.masked_range import SLACK, VANISHED
from aimet_quadapter.precision.softmax_loss import SoftmaxLoss
from aimet_quadapter.precision.value_shift import solve
from aimet_quadapter.sim.sites import Trials, set_output_bits

DIFFUSE = 0.05
"""Factor of queries that makes every head look at all tokens alike."""


def diffuse_llama(layers: int = 2) -> Any:
    """A Llama whose heads look everywhere, at values with a mean."""
    model = llama(layers)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight *= DIFFUSE
            layer.input_layernorm.weight.abs_()
            model.model.embed_tokens.weight[:, 0] = 3.0
            attention.v_proj.weight[:, 0] += 1.0
    return model


def diffuse_gpt2(layers: int = 2) -> Any:
    """The same as a GPT-2, whose values get their mean from the bias."""
    model = gpt2(layers)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] *= DIFFUSE
            block.attn.c_attn.bias[:32] *= DIFFUSE
            block.attn.c_attn.bias[64:] += 2.0
    return model


MODELS = {"llama": diffuse_llama, "gpt2": diffuse_gpt2}


@copied
def coarse_sim(make: Any, bits: int = 4, **settings: Any) -> QuantizationSimModel:
    """Ranges set; 32 tokens lose in a softmax of 4 bits what 512 lose in one of 8."""
    sim = decoder_sim(make(), **({"config_file": "htp_v73"} | settings))
    set_output_bits(sim, ["*.softmax"], bits)
    set_ranges(sim, batches())
    return sim


@pytest.fixture(params=MODELS)
def sim(request) -> QuantizationSimModel:
    return coarse_sim(MODELS[request.param])


def unquantized(sim: QuantizationSimModel, ids: Tensor, *inputs: Tensor) -> Tensor:
    with torch.no_grad(), remove_all_quantizers(sim.model):
        return sim.model(ids, *inputs).as_subclass(Tensor)


def test_the_unquantized_function_stays(sim) -> None:
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 15:] = 0
    before = unquantized(sim, ids), unquantized(sim, ids, mask)
    compensation = compensate_softmax(sim, batches())
    after = unquantized(sim, ids), unquantized(sim, ids, mask)
    for old, new in zip(before, after, strict=True):
        assert (old - new).abs().max() <= 1e-4 * old.abs().max()
    assert all(a.shift.c.abs().max() > 0.1 for a in compensation.attentions)


def test_it_brings_the_sim_nearer_to_the_unquantized_model(sim) -> None:
    trials = Trials(sim, batches(seed=7), "distillation")
    before = trials.loss()
    compensation = compensate_softmax(sim, batches())
    assert trials.loss() < 0.5 * before
    for found in compensation.attentions:
        assert 0.5 < found.shift.kept <= 1
        assert found.shift.left < 0.2
        assert found.name in str(compensation)


def test_the_shift_is_the_least_squares_one() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = SoftmaxLoss()
    rows, right = [], []
    softmax = torch.nn.Softmax(dim=-1)
    for _ in range(3):
        scores = torch.randn(1, 2, 6, 6, generator=generator)
        values = 1 + torch.randn(1, 2, 6, 3, generator=generator)
        rounded = (softmax(scores) * 7).round() / 7
        visible = torch.ones(1, 1, 6, 1, dtype=torch.bool)
        loss.add(softmax(scores), rounded, values, visible)
        lost = (rounded - softmax(scores))[0]
        rows.append(lost.sum(-1).flatten())  # heads share their channels, as grouped queries do
        right.append((lost @ values[0]).flatten(0, 1))
    shift = solve(loss, torch.arange(3).repeat(2), 3)
    solution = torch.linalg.lstsq(torch.cat(rows)[:, None], torch.cat(right)).solution[0]
    assert torch.allclose(shift.c.float(), shift.kept * solution, atol=1e-5)


def test_values_without_a_mean_are_left_alone() -> None:
    """λ from samples left out: what was fitted to noise is not used."""
    generator = torch.Generator().manual_seed(0)
    loss = SoftmaxLoss()
    softmax = torch.nn.Softmax(dim=-1)
    for sign in (1, -1, 1, -1):
        scores = 0.1 * torch.randn(1, 1, 8, 8, generator=generator)
        values = sign * torch.ones(1, 1, 8, 4)
        rounded = (softmax(scores) * 3).round() / 3
        visible = torch.ones(1, 1, 8, 1, dtype=torch.bool)
        loss.add(softmax(scores), rounded, values, visible)
    shift = solve(loss, torch.arange(4), 4)
    assert shift.kept == 0
    assert not shift.c.any()
    assert shift.left == 1


def test_masked_scores_get_no_range(sim) -> None:
    compensation = compensate_softmax(sim, batches())
    seen: dict[str, list[Tensor]] = {}
    modules = dict(sim.model.named_modules())
    for found in compensation.attentions:
        softmax = modules[f"{found.name}.softmax"]
        seen[found.name] = []
        softmax.register_forward_pre_hook(
            lambda _, args, name=found.name: seen[name].append(args[0].amax(-1).min())
        )
    with torch.no_grad():
        for batch in batches():
            sim.model(batch)
    for found in compensation.attentions:
        assert found.was is not None
        assert found.range is not None
        least = float(torch.stack(seen[found.name]).min())
        step = (found.range[1] - found.range[0]) / 255
        assert found.was[0] < -40  # down to the mask
        assert found.range[0] == pytest.approx(least - VANISHED - SLACK, abs=2 * step)
        assert found.range[1] == pytest.approx(found.was[1], abs=2 * step)


def test_what_is_masked_stays_hidden_in_new_text() -> None:
    """Sharp heads, whose largest scores differ from row to row: no token sees a later one."""
    hf = llama()
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight *= 15
    sim = decoder_sim(hf, config_file="htp_v73")
    set_ranges(sim, batches())
    compensation = compensate_softmax(sim, [batches()[0]], [batches()[0][:1]])
    assert any(a.range != a.was for a in compensation.attentions)
    ids = tokens(64, 32, seed=40)
    other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % VOCAB), 1)
    with torch.no_grad():
        difference = (sim.model(ids) - sim.model(other))[:, :-1].abs().max()
    assert difference == 0


def test_padding_does_not_count() -> None:
    ids = torch.cat(batches())
    padded = torch.cat((torch.full((4, 6), 1), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for loader in ([(ids,)], [(padded, mask, position)]):
        sim = coarse_sim(diffuse_llama)
        found.append(compensate_softmax(sim, loader).attentions)
    for plain, left in zip(*found, strict=True):
        assert torch.allclose(left.shift.c, plain.shift.c, rtol=0.05, atol=0.05)
        assert plain.range is not None
        assert left.range is not None
        assert left.range[0] == pytest.approx(plain.range[0], abs=0.5)


def test_a_symmetric_range_of_scores_shrinks_on_both_sides() -> None:
    sim = decoder_sim(diffuse_gpt2(), config_file="htp_v73")
    for name, module in sim.named_qmodules():
        if name.endswith("add_mask"):
            module.output_quantizers[0] = QuantizeDequantize((), -128, 127, symmetric=True)
    set_ranges(sim, batches())
    for found in compensate_softmax(sim, batches()).attentions:
        assert found.was is not None
        assert found.range is not None
        assert found.range[0] > 0.8 * found.was[0]
        assert found.range[1] < 0.8 * found.was[1]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_result_is_exported_and_runs(make, tmp_path) -> None:
    sim = coarse_sim(functools.partial(make, layers=1), bits=8)
    compensate_softmax(sim, batches())
    coverage(sim, strict=True)
    ids = tokens(1, 16)
    folder = export(sim, ids, tmp_path / "out")
    check_same_but_for_rounding(steps(run_on_cpu(folder, [ids.numpy()]), sim, ids))


def test_the_result_generates_what_the_sim_says(tmp_path) -> None:
    make = functools.partial(diffuse_llama, layers=1)
    sim = coarse_sim(make, bits=8, default_output_bw=16)
    compensate_softmax(sim, batches())
    export_generation(sim, tmp_path / "out", prompt_length=8, cache_length=24)
    ids = tokens(1, 8)
    generated = generate_on_cpu(tmp_path / "out", ids[0].tolist(), 12).ids
    for token in generated:
        with torch.no_grad():
            row = sim.model(ids)[0, -1]
        step = float(sim.model.lm_head.output_quantizers[0].get_scale())
        assert row[token] >= row.max() - ROUNDING[16][1] * step
        ids = torch.cat((ids, torch.tensor([[token]])), 1)


def test_half_precision() -> None:
    sim = coarse_sim(lambda: diffuse_llama().to(torch.bfloat16))
    compensation = compensate_softmax(sim, batches())
    assert sim.model.model.layers[0].self_attn.v_proj.bias.dtype == torch.bfloat16
    assert all(a.shift.left < 0.5 for a in compensation.attentions)


def test_pairs_found_before_do_not_know_the_new_biases() -> None:
    sim = coarse_sim(diffuse_llama)
    pairs = find_pairs(sim, kinds="v-o")
    compensate_softmax(sim, batches())
    before = state(sim)
    with pytest.raises(ValueError, match=r"v_proj has a bias .*find_pairs\(sim\)"):
        fold(sim, pairs, {p.name: torch.full((p.channels,), 2.0) for p in pairs})
    with pytest.raises(ValueError, match="v_proj has a bias"):
        attach(sim, pairs, {p.name: torch.ones(p.channels) for p in pairs})
    assert_same(sim, before)
    again = find_pairs(sim, kinds="v-o")
    reference = unquantized(sim, tokens())
    fold(sim, again, {p.name: torch.full((p.channels,), 2.0) for p in again})
    assert torch.allclose(unquantized(sim, tokens()), reference, atol=1e-4)


def test_weights_restored_takes_the_new_biases_away(sim) -> None:
    pairs = find_pairs(sim)
    before = {k: v.clone() for k, v in sim.model.named_parameters() if "quantizer" not in k}
    with weights_restored(sim, pairs):
        compensate_softmax(sim, batches())
    after = {k: v for k, v in sim.model.named_parameters() if "quantizer" not in k}
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    logits(sim)


def test_an_interruption_leaves_the_sim_as_it_was(sim, monkeypatch) -> None:
    before, output = state(sim), logits(sim)

    def interrupted(*_: Any) -> None:
        set_ranges(sim, batches(seed=3))
        raise KeyboardInterrupt

    monkeypatch.setattr(implementation, "set_ranges", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compensate_softmax(sim, batches())
    assert_same(sim, before)
    assert torch.equal(logits(sim), output)


def without_softmax(sim: QuantizationSimModel) -> None:
    keep_module_sites(sim)


def without_ranges(sim: QuantizationSimModel) -> None:
    for name, module in sim.named_qmodules():
        if name.endswith("softmax"):
            module.output_quantizers[0] = QuantizeDequantize((), 0, 255, symmetric=False)


def attached(sim: QuantizationSimModel) -> None:
    pairs = find_pairs(sim)
    attach(sim, pairs, {p.name: torch.ones(p.channels) for p in pairs})


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (without_softmax, SimError, "no softmax of the sim has a quantizer"),
        (without_ranges, SimError, "softmax.output_quantizers.0 has no range"),
        (attached, UnfoldedError, "already carries"),
    ],
)
def test_sims_that_do_not_fit_are_refused(spoil, error, match) -> None:
    sim = coarse_sim(diffuse_gpt2)
    spoil(sim)
    before = state(sim)
    with pytest.raises(error, match=match):
        compensate_softmax(sim, batches())
    assert_same(sim, before)


def test_a_model_that_was_not_prepared_is_refused() -> None:
    sim = QuantizationSimModel(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(1, 4))
    with pytest.raises(SimError, match=r"prepare\(model\)"):
        compensate_softmax(sim, [torch.randn(2, 4)])


def test_one_sample_is_refused(sim) -> None:
    before = state(sim)
    with pytest.raises(DataError, match="at least 2"):
        compensate_softmax(sim, [tokens(1, 12)])
    assert_same(sim, before)
