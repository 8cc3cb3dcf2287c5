"""apply_quadapter and fold as a user calls them."""

from __future__ import annotations

import copy
import sys

import aimet_torch
import pytest
import torch
from aimet_torch.utils import remove_all_quantizers
from tiny import FAST, assert_same, batches, logits, ready, simulate, state
from tiny import outlier_gpt2 as gpt2
from tiny import outlier_llama as llama

from aimet_quadapter import (
    DataError,
    FinetuneConfig,
    PairError,
    SimError,
    UnfoldedError,
    apply_quadapter,
    attach,
    calibrate,
    detach,
    find_pairs,
    finetune,
    fold,
    set_ranges,
    weights_restored,
)
from aimet_quadapter.pairs.attachment import is_attached


def unquantized(sim) -> torch.Tensor:
    with torch.no_grad(), remove_all_quantizers(sim.model):
        return sim.model(batches(seed=5)[0])


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("config_file", ["default", "htp_v79"])
def test_apply_quadapter_brings_the_output_nearer_and_keeps_the_function(build, config_file):
    ptq = simulate(build(), config_file=config_file)
    set_ranges(ptq, [*batches(), *batches(seed=1)])
    target = unquantized(ptq)
    sim = simulate(build(), config_file=config_file)
    weights = {n: p.clone() for n, p in sim.model.named_parameters() if "quantizers" not in n}
    result = apply_quadapter(sim, [*batches(), *batches(seed=1)], calibration=FAST)
    torch.testing.assert_close(unquantized(sim), target, atol=1e-4, rtol=1e-4)
    assert (logits(sim) - target).pow(2).mean() < (logits(ptq) - target).pow(2).mean()
    changed = {
        n
        for n, p in sim.model.named_parameters()
        if n in weights and not torch.equal(p, weights[n])
    }
    assert changed <= {f"{s.module}.{s.parameter}" for p in result.pairs for s in p.scales}
    assert not is_attached(sim)
    assert all(q.is_initialized() for q in sim.quantizers())
    assert result.alphas.keys() == {p.name for p in result.pairs}
    assert "wall time" in str(result)


def test_default_pairs_of_gpt2_are_the_papers():
    sim = simulate(gpt2())
    result = apply_quadapter(sim, batches(), calibration=FAST)
    assert result.pairs.counts() == {"norm-linear": 4, "norm-head": 1}
    assert [r.pair for r in result.calibration.results] == list(result.pairs)


def test_both_phases_lower_the_loss_and_leave_every_weight_scaled_only():
    sim = simulate(gpt2())
    before = {n: p.clone() for n, p in sim.model.named_parameters() if "quantizers" not in n}
    result = apply_quadapter(
        sim,
        batches(),
        calibration=FAST,
        finetune_loader=batches(),
        finetuning=FinetuneConfig(steps=20, loss="distillation"),
    )
    curve = [v for _, v in result.finetuning.curve]
    assert sum(curve[-5:]) < sum(curve[:5])
    for pair in result.pairs:
        for scale in pair.scales:
            module = sim.model.get_submodule(scale.module)
            expected = scale.apply(
                before[f"{scale.module}.{scale.parameter}"], result.alphas[pair.name]
            )
            torch.testing.assert_close(getattr(module, scale.parameter).detach(), expected)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_fold_keeps_output_and_encodings_exactly(build):
    sim = ready(build)
    pairs = find_pairs(sim)
    finetune(sim, batches(), pairs, config=FinetuneConfig(steps=4))
    attached, encodings = (
        logits(sim),
        {k: v.clone() for k, v in sim.quantizer_state_dict().items() if torch.is_tensor(v)},
    )
    fold(sim)
    assert torch.equal(logits(sim), attached)
    for name, value in sim.quantizer_state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, encodings[name])
    assert not is_attached(sim)
    assert not any("quadapter" in k for m in sim.model.modules() for k in vars(m))
    assert not any("forward" in vars(m) for m in sim.model.modules())


def test_a_run_that_dies_leaves_the_sim_as_it_was(monkeypatch):
    sim = simulate(gpt2())
    before = state(sim)
    pipeline = sys.modules["aimet_quadapter.pipeline"]

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    for stage in ("set_ranges", "finetune"):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, die)
            with pytest.raises(KeyboardInterrupt):
                apply_quadapter(sim, batches(), calibration=FAST, finetune_loader=batches())
        assert_same(sim, before)
        assert not is_attached(sim)


def test_refusals():
    sim = simulate(gpt2())
    with pytest.raises(SimError, match="has no range yet"):
        finetune(sim, batches(), find_pairs(sim))
    with pytest.raises(PairError, match="no pair was found"):
        apply_quadapter(sim, batches(), pairs=[])
    with pytest.raises(DataError, match="yields no samples"):
        apply_quadapter(sim, [])
    pairs = find_pairs(sim)[:1]
    attach(sim, pairs, {pairs[0].name: torch.ones(pairs[0].channels)})
    for call in (apply_quadapter, calibrate):
        with pytest.raises(UnfoldedError, match=r"already carries α in transformer.h.0.ln_1"):
            call(sim, batches())
    with pytest.raises(UnfoldedError, match="carries an α already"):
        fold(sim, pairs, {pairs[0].name: torch.ones(pairs[0].channels)})
    detach(sim)
    with pytest.raises(ValueError, match="every scale must be positive and finite"):
        fold(sim, pairs, {pairs[0].name: torch.zeros(pairs[0].channels)})


def test_weights_come_back_after_a_trial():
    sim = ready()
    before = state(sim)
    pairs = find_pairs(sim)
    with weights_restored(sim, pairs):
        fold(sim, pairs, {p.name: torch.full((p.channels,), 3.0) for p in pairs})
        assert not torch.equal(sim.model.lm_head.weight, before["lm_head.weight"])
    assert_same(sim, before)


def test_aimets_own_tools_work_on_the_folded_sim(tmp_path):
    from aimet_torch.seq_mse import apply_seq_mse

    sim = simulate(gpt2(), default_param_bw=4)
    apply_quadapter(sim, batches(), calibration=FAST)
    reference = logits(sim)
    saved = copy.deepcopy(sim.quantizer_state_dict())
    apply_seq_mse(sim, batches(), num_candidates=4)
    assert not torch.equal(logits(sim), reference)
    sim.model.load_state_dict(saved, strict=False)
    torch.testing.assert_close(logits(sim), reference)
    folded = sim.get_original_model(sim.model)
    again = simulate(folded, default_param_bw=4)
    again.model.load_state_dict(saved, strict=False)
    torch.testing.assert_close(logits(again), reference)
    sim.onnx.export(
        args=sim.model.dummy_input(),
        f=str(tmp_path / "model.onnx"),
        encoding_version="1.0.0",
        dynamo=False,
    )
    assert (tmp_path / "model.onnx").exists()


def _distance(sim):
    """Squared error of the logits, relative to those of the unquantized model."""
    with remove_all_quantizers(sim.model):
        unquantized = logits(sim)
    return (logits(sim) - unquantized).square().mean() / unquantized.square().mean()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_adascale_trains_every_linear_of_a_prepared_models_blocks(build):
    from aimet_torch.adascale import apply_adascale

    sim = simulate(build(), default_param_bw=4)
    loader = [batch for seed in range(4) for batch in batches(seed)]
    apply_quadapter(sim, loader, calibration=FAST)
    before, distance = state(sim), _distance(sim)
    apply_adascale(sim, loader, num_iterations=2)
    set_ranges(sim, loader)
    linears = [n for n, m in sim.model.named_modules() if isinstance(m, torch.nn.Linear)]
    after = state(sim)
    moved = {n for n in linears if not torch.equal(after[f"{n}.weight"], before[f"{n}.weight"])}
    assert moved == set(linears) - {"lm_head"}
    assert _distance(sim) < 1.25 * distance  # two iterations move it either way, and little


def test_adaround_runs_on_the_folded_model(tmp_path):
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

    sim = simulate(gpt2(), default_param_bw=4)
    apply_quadapter(sim, batches(), calibration=FAST)
    model = aimet_torch.QuantizationSimModel.get_original_model(sim.model)
    params = AdaroundParameters(batches(), num_batches=1, default_num_iterations=5)
    rounded = Adaround.apply_adaround(
        model, model.dummy_input(), params, str(tmp_path), "adaround", default_param_bw=4
    )
    again = simulate(rounded, default_param_bw=4)
    again.set_and_freeze_param_encodings(str(tmp_path / "adaround.encodings"))
    set_ranges(again, batches())
    assert logits(again).isfinite().all()
