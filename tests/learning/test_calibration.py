"""Phase 1 on a small random GPT-2 and Llama whose norms have outlier channels."""

from __future__ import annotations

import sys
from dataclasses import replace

import aimet_torch
import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize, quantize_dequantize
from aimet_torch.utils import remove_all_quantizers, ste_round
from tiny import BLOCKS, FAST, VOCAB, assert_same, batches, simulate, state
from tiny import outlier_gpt2 as gpt2
from tiny import outlier_llama as llama
from torch import nn

from aimet_quadapter import (
    CalibrationConfig,
    DataError,
    PairError,
    SimError,
    analytic_alphas,
    calibrate,
    find_pairs,
)
from aimet_quadapter.learning.blocks import capture
from aimet_quadapter.sim.ranges import dynamic, restored
from aimet_quadapter.sim.samples import as_samples


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("config_file", ["default", "htp_v73"])
def test_block_errors_fall_and_the_sim_stays_as_it_was(build, config_file):
    sim = simulate(build(), config_file)
    before = state(sim)
    result = calibrate(sim, batches(), config=BLOCKS)
    assert_same(sim, before)
    assert {p.name for p in result.pairs} == set(result.alphas)
    for r in result.results:
        assert r.alpha.shape == (r.pair.channels,)
        assert (r.alpha > 0).all()
        assert r.loss == min(r.losses.values())
        assert r.loss <= min(v for s, v in r.losses.items() if s != "learned")
    ratios = result.error_ratio("ones")
    assert max(ratios.values()) <= 1
    assert ratios["norm-linear"] < 0.9
    assert "pairs in" in str(result)


def test_outlier_from_a_bias_is_learned_where_cle_cannot_see_it():
    sim = simulate(gpt2())
    pairs = find_pairs(sim, kinds=["norm-linear"], names="*.ln_1")
    result = calibrate(sim, batches(), pairs, BLOCKS)
    assert len(result.results) == 2
    for r in result.results:
        assert r.loss < 0.5 * r.losses["ones"]
        assert r.loss < 0.8 * r.losses["cle"]


def test_the_same_seed_gives_the_same_alpha():
    pairs = find_pairs(simulate(gpt2()))[:2]
    first = calibrate(simulate(gpt2()), batches(), pairs, FAST)
    second = calibrate(simulate(gpt2()), batches(), pairs, FAST)
    for name, alpha in first.alphas.items():
        assert torch.equal(alpha, second.alphas[name])


def test_paper_preset_is_exact():
    config = CalibrationConfig.paper()
    assert (config.parametrization, config.start) == ("plain", "ones")
    assert (config.lr, config.decay, config.decay_every, config.steps) == (0.1, 0.2, 100, 500)
    assert (config.tokens, config.head_rows) == (None, None)
    assert (config.keep_best, config.holdout) == (False, 0.0)


def test_paper_settings_lower_the_block_error_and_say_how_many_scales_crossed_zero():
    sim = simulate(gpt2())
    pairs = find_pairs(sim, names="*.h.0.ln_1")
    result = calibrate(sim, batches(), pairs, CalibrationConfig.paper(steps=60))
    (r,) = result.results
    assert r.kept == "learned"
    assert r.loss < r.losses["ones"]
    assert (r.alpha > 0).all()
    assert r.crossed >= 0


LAYERS = replace(FAST, objective="layer")


@pytest.mark.parametrize(("config", "units", "done"), [(LAYERS, 3, 1), (FAST, 7, 3)])
def test_an_interrupted_run_resumes_with_the_same_result(
    tmp_path, monkeypatch, config, units, done
):
    """Two layers and the head's pair, or seven blocks."""
    module = sys.modules["aimet_quadapter.learning.calibration"]
    sim = simulate(gpt2())
    pairs = find_pairs(sim)
    whole = calibrate(sim, batches(), pairs, config)
    before = state(sim)
    learn, calls = module.Learner.learn, []

    def learn_some(self):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(self.error.name)
        return learn(self)

    monkeypatch.setattr(module.Learner, "learn", learn_some)
    with pytest.raises(KeyboardInterrupt):
        calibrate(sim, batches(), pairs, config, tmp_path)
    assert_same(sim, before)
    assert len(list(tmp_path.glob("*.safetensors"))) == done
    assert not list(tmp_path.glob("*.partial"))
    calls.clear()
    monkeypatch.setattr(module.Learner, "learn", lambda self: (calls.append(1), learn(self))[1])
    resumed = calibrate(sim, batches(), pairs, config, tmp_path)
    assert len(calls) == units - done
    for name, alpha in whole.alphas.items():
        assert torch.equal(alpha, resumed.alphas[name])
    calls.clear()
    calibrate(sim, batches(seed=1), pairs, config, tmp_path)  # other data: nothing is reused
    assert len(calls) == units


def test_a_broken_checkpoint_is_calibrated_again(tmp_path):
    sim = simulate(gpt2())
    pairs = find_pairs(sim)[:1]
    first = calibrate(sim, batches(), pairs, FAST, tmp_path)
    block, choice = tmp_path.glob("*.safetensors")
    for file in (block, choice):
        file.write_bytes(b"not safetensors")
    again = calibrate(sim, batches(), pairs, FAST, tmp_path)
    assert torch.equal(*(r.alphas[pairs[0].name] for r in (first, again)))


def test_groups_of_blocks_do_not_change_the_result():
    pairs = find_pairs(simulate(llama()))
    small = CalibrationConfig(**{**FAST.to_dict(), "capture_bytes": 1})
    one = calibrate(simulate(llama()), batches(), pairs, FAST)
    many = calibrate(simulate(llama()), batches(), pairs, small)
    for name, alpha in one.alphas.items():
        assert torch.equal(alpha, many.alphas[name])


def test_a_block_replayed_without_quantizers_is_the_model():
    sim = simulate(llama())
    sample = (batches()[0][:1],)
    pairs = find_pairs(sim)
    seen: dict[str, torch.Tensor] = {}
    for pair in pairs:
        for name in pair.consumers:
            module = sim.model.get_submodule(name)
            module.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, o))
    with torch.no_grad(), remove_all_quantizers(sim.model):
        sim.model(*sample)
    generator = torch.Generator().manual_seed(0)
    for blocks in capture(sim, pairs, [sample], 1 << 30):
        for block in blocks:
            alpha = torch.rand(block.pair.channels, generator=generator) + 0.5
            with torch.no_grad(), block.unquantized():
                plain, scaled = block(block.runs[0]), block(block.runs[0], alpha)
            for name, y, z in zip(block.pair.consumers, plain, scaled, strict=True):
                torch.testing.assert_close(y.reshape(seen[name].shape), seen[name])
                torch.testing.assert_close(z, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config_file", ["htp_v73", "default"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_rows_that_are_wanted_are_those_of_all_rows(build, config_file):
    """Ranges are those of all rows; consumers that nothing quantizes before read few."""
    sim = simulate(build(), config_file)
    samples = as_samples(batches(), sim.model)
    read, kinds = [], {}
    for blocks in capture(sim, find_pairs(sim), samples, 1 << 30):
        for block in blocks:
            name = block.pair.consumers[0]
            hook = sim.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args: read.append(args[0].flatten(0, -2).shape[0])
            )
            with torch.no_grad(), block.quantized(), hook:
                for run in block.runs:
                    whole = [y.flatten(0, -2) for y in block(run)]
                    wanted = torch.arange(len(whole[0])) % 3 == 0
                    for few, y in zip(block(run, wanted=wanted), whole, strict=True):
                        torch.testing.assert_close(few, y[wanted], rtol=1e-4, atol=1e-5)
            kinds[block.pair.kind] = read[-1] / len(whole[0])
    if config_file == "htp_v73":
        by_row = [kinds[k] for k in ("norm-linear", "norm-head", "up-down") if k in kinds]
        assert by_row == pytest.approx([1 / 3] * len(by_row), abs=0.05)
    assert kinds["v-o"] == 1  # attention is not by row


def test_wide_heads_use_rows_that_hold_every_extreme():
    sim = simulate(gpt2())
    pairs = find_pairs(sim, kinds=["norm-head"])
    config = CalibrationConfig(**{**BLOCKS.to_dict(), "head_rows": 8})
    learn_all = calibrate(sim, batches(), pairs, BLOCKS)
    learn_some = calibrate(sim, batches(), pairs, config)
    assert learn_some.results[0].loss <= learn_some.results[0].losses["ones"]
    assert learn_all.results[0].alpha.shape == learn_some.results[0].alpha.shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_ranges_equal_aimets_min_max(symmetric, shape, bits):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3 + 1
    q = QuantizeDequantize(shape=shape, bitwidth=bits, symmetric=symmetric)
    with dynamic([q]):
        ours = q(x)
    assert not q.is_initialized()
    with restored([q]):
        with q.compute_encodings():
            q(x)
        theirs = q(x)
    assert not q.is_initialized()
    torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), atol=1e-6, rtol=0)
    y, target = x.clone().requires_grad_(), torch.randn(6, 40)
    with dynamic([q]):
        (gradient,) = torch.autograd.grad((q(y) * target).sum(), y)
    expected = _gradient_of_parts(x, q, target)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def _gradient_of_parts(x, q, target):
    """The same gradient from AIMET's quantize_dequantize and torch's amin and amax."""
    y = x.clone().requires_grad_()
    dims = [1] if q.shape else [0, 1]
    low = y.amin(dims, keepdim=bool(q.shape)).clamp(max=0)
    high = y.amax(dims, keepdim=bool(q.shape)).clamp(min=0)
    steps = q.qmax - q.qmin
    if q.symmetric:
        scale = torch.maximum(high / (steps // 2), -low / (steps - steps // 2))
        offset = torch.zeros_like(scale)
    else:
        scale = (high - low) / steps
        offset = ste_round(low / scale) - q.qmin
    out = quantize_dequantize(y, scale, offset, q.qmin, q.qmax)
    return torch.autograd.grad((out * target).sum(), y)[0]


def test_analytic_scales_follow_their_formulas():
    sim = simulate(gpt2())
    pairs = find_pairs(sim, names="*.h.0.ln_2")
    (pair,) = pairs
    norm = sim.model.get_submodule(pair.producer)
    linear = sim.model.get_submodule(pair.consumers[0])
    alpha = analytic_alphas(sim, batches(), pairs, "cle")[pair.name]
    expected = (linear.weight.abs().amax(0) / norm.weight.abs()).sqrt()
    torch.testing.assert_close(alpha, expected.detach())
    seen = []
    handle = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad(), remove_all_quantizers(sim.model):
        for batch in batches():
            sim.model(batch)
    handle.remove()
    x = torch.cat(seen).flatten(0, 1).abs().amax(0)
    alpha = analytic_alphas(sim, batches(), pairs, "smoothquant")[pair.name]
    expected = (linear.weight.abs().amax(0) / x).sqrt()
    torch.testing.assert_close(alpha, expected.detach())
    with pytest.raises(ValueError, match="unknown method 'awq'; known: cle, smoothquant"):
        analytic_alphas(sim, batches(), pairs, "awq")


def test_a_convolutional_net_is_calibrated():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        net[0].weight[2] *= 50
    x = torch.randn(4, 3, 12, 12)
    sim = aimet_torch.QuantizationSimModel(net, x[:1])
    result = calibrate(sim, [x], config=FAST)
    assert [r.pair.kind for r in result.results] == ["conv-relu-conv"] * 2
    assert all(r.loss < r.losses["ones"] for r in result.results)


BAD = {
    "no samples": ([], "yields no samples"),
    "not iterable": (7, "expected an iterable of model inputs, got int"),
    "floats": ([torch.zeros(1, 8)], "token ids of type torch.float32; expected integers"),
    "one dimension": ([torch.zeros(8, dtype=torch.long)], r"shape \(8,\); expected"),
    "unknown token": ([torch.full((1, 8), VOCAB)], "token id 96; the model knows 0 … 95"),
    "too long": ([torch.zeros(1, 65, dtype=torch.long)], "65 tokens a sample; the model takes"),
    "unknown key": ([{"labels": torch.zeros(1, 8)}], "key 'labels'"),
    "other type": ([{1}], "batch 0 is a set"),
    "empty batch": ([torch.zeros(1, 0, dtype=torch.long)], "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_before_any_work(case):
    loader, message = BAD[case]
    sim = simulate(gpt2())
    before = state(sim)
    with pytest.raises(DataError, match=message):
        calibrate(sim, loader, config=FAST)
    assert_same(sim, before)


def test_samples_may_be_dicts_tuples_and_masked():
    sim = simulate(gpt2())
    ids = batches()[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    as_dict = [{"attention_mask": mask, "input_ids": ids}]
    pairs = find_pairs(sim)[:1]
    one = calibrate(sim, as_dict, pairs, FAST)
    two = calibrate(sim, [(ids, mask)], pairs, FAST)
    assert torch.equal(*(r.alphas[pairs[0].name] for r in (one, two)))


def test_wrong_sims_are_refused():
    model = gpt2()
    with pytest.raises(SimError, match=r"expected an aimet_torch\.QuantizationSimModel, got Prep"):
        calibrate(model, batches())
    sim = simulate(model)
    with pytest.raises(PairError, match="no pair was found"):
        calibrate(sim, batches(), pairs=[])
    with torch.no_grad():
        sim.model.transformer.h[0].ln_1.weight[0] = torch.nan
    with pytest.raises(SimError, match=r"transformer.h.0.ln_1.weight holds NaN"):
        calibrate(sim, batches())
    sim = simulate(gpt2())
    with remove_all_quantizers(sim.model), pytest.raises(SimError, match="every quantizer"):
        calibrate(sim, batches())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", -1), ("lr", 0.0), ("parametrization", "log"), ("start", "awq"), ("holdout", 1.0)],
)
def test_bad_settings_name_the_value(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}; expected"):
        CalibrationConfig(**{setting: value})
