"""The choice of α by the whole model: never above any of them, and what decides it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from aimet_torch.utils import remove_all_quantizers
from tiny import (
    BLOCKS,
    FAST,
    assert_same,
    batches,
    gpt2,
    llama,
    make_sim,
    outlier_llama,
    simulate,
    state,
    tokens,
)
from torch import nn

from aimet_quadapter import (
    CalibrationConfig,
    DataError,
    calibrate,
    find_pairs,
    fold,
    prepare,
    set_ranges,
    weights_restored,
)
from aimet_quadapter.learning.choice import COMPOSED, Search, choose, held_back
from aimet_quadapter.learning.ranks import Ranks
from aimet_quadapter.sim.inputs import Sample
from aimet_quadapter.sim.losses import EndLoss, distillation
from aimet_quadapter.sim.samples import as_samples


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("choice", ["kind", "layer"])
def test_what_is_chosen_is_never_worse_than_any_formula_on_held_back_text(build, choice):
    sim = simulate(prepare(build()), "htp_v73")
    pairs = find_pairs(sim)
    before = state(sim)
    loader = [tokens(1, 16, seed) for seed in range(8)]
    result = calibrate(sim, loader, pairs, replace(FAST, choice=choice))
    assert_same(sim, before)
    fitted, held = held_back(as_samples(loader, sim.model))
    end_loss = EndLoss(sim.model, held)

    def loss_with(alphas):
        with weights_restored(sim, pairs):
            fold(sim, pairs, alphas)
            set_ranges(sim, fitted[: max(len(held), 2)])
            return end_loss()

    names = ("ones", "cle", "smoothquant", "learned", "halfway")
    of_all = {n: {r.pair.name: r.candidates[n] for r in result.results} for n in names}
    for name, alphas in of_all.items():
        assert result.choice.losses[name] == pytest.approx(loss_with(alphas), rel=1e-3)
        assert result.choice.loss <= result.choice.losses[name]
    assert loss_with(result.alphas) == pytest.approx(result.choice.loss, rel=1e-3)
    assert result.choice.trials >= 5
    for r in result.results:
        assert torch.equal(r.alpha, r.candidates[r.kept])
        assert torch.equal(r.candidates["halfway"], r.candidates["learned"].sqrt())
    assert "held-back text" in str(result)


def test_ranges_put_together_are_those_of_their_own(monkeypatch):
    """On the samples that ranges are set on, α of a pair changes those inside the pair alone."""
    sim = simulate(outlier_llama(), "htp_v73")
    samples = as_samples(batches(), sim.model)
    results = calibrate(sim, samples, None, replace(FAST, choice="block")).results
    search = Search(sim, results, samples, samples, None, Ranks())
    with search.trying():
        search.compare_uniform()
        run, passes, moved = search._run, [], 0.0
        monkeypatch.setattr(search, "_run", lambda model: passes.append(1) or run(model))
        kinds = dict.fromkeys(r.pair.kind for r in results)
        assert len(kinds) > 2
        for kind in kinds:
            mixed = search.best | {r.pair.name: "ones" for r in results if r.pair.kind == kind}
            search.trial((COMPOSED, *mixed.values()))
            assert not passes
            composed = ends(search)
            weights = state(sim)
            search.trial(tuple(mixed.values()))
            assert passes == [1]
            passes.clear()
            own, before = ends(search), torch.stack(search._ends_of(search.kept["all"])).view(-1, 2)
            widths = own[:, 1] - own[:, 0]
            assert ((composed - own).abs() <= 0.05 * widths[:, None]).all()
            moved = max(moved, float(((before - own)[:, 1].abs() / widths).max()))
            for name, value in state(sim).items():
                if "param_quantizers" in name:
                    torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=0)
    assert moved > 0.5


def test_a_rank_that_set_no_ranges_itself_can_take_those_of_others():
    """As one has that goes on with a choice of which others had done the first trials."""
    sim, fresh = (simulate(outlier_llama(), "htp_v73") for _ in range(2))
    samples = as_samples(batches(), sim.model)
    results = calibrate(sim, samples, None, replace(FAST, choice="block")).results
    first, other = (Search(s, results, samples, samples, None, Ranks()) for s in (sim, fresh))
    kind = results[0].pair.kind
    kept = {r.pair.name: "ones" if r.pair.kind == kind else "learned" for r in results}
    with first.trying():
        first.compare_uniform()
        expected = first.trial((COMPOSED, *kept.values()))
    other.tried, other.ends, other.kept = first.tried, first.ends, first.kept
    with other.trying():
        assert other.trial((COMPOSED, *kept.values())) == expected


def ends(search):
    """Of the ranges of all activations, (quantizers, 2)."""
    return torch.stack([end.detach().clone() for end in search._parameters()]).view(-1, 2)


def test_what_is_better_with_ranges_of_others_alone_is_not_taken(monkeypatch):
    sim = simulate(outlier_llama(), "htp_v73")
    samples = as_samples(batches() + batches(1), sim.model)
    found = calibrate(sim, samples, None, replace(FAST, choice="block")).results
    wrong = lambda _, setting: torch.tensor(-1.0 if "learned" in setting.values() else 1.0)  # noqa: E731
    monkeypatch.setattr(Search, "_composed_loss", wrong)
    chosen, choice = choose(sim, [_too_far(r) for r in found], samples, samples, by_layer=False)
    assert choice.kept == {"all": "halfway"}
    assert choice.loss == choice.losses["halfway"]
    assert {r.kept for r in chosen} == {"halfway"}


def test_half_the_way_is_taken_where_the_learned_alpha_goes_too_far():
    """α whose square root is right: each block says "learned", the model says "halfway"."""
    sim = simulate(outlier_llama(), "htp_v73")
    samples = as_samples(batches() + batches(1), sim.model)
    found = calibrate(sim, samples, None, replace(FAST, choice="block")).results
    chosen, choice = choose(sim, [_too_far(r) for r in found], samples, samples, by_layer=False)
    assert choice.kept["all"] == "halfway"
    assert choice.loss < min(v for name, v in choice.losses.items() if name != "halfway")
    assert any(r.kept == "halfway" for r in chosen)


def test_an_interrupted_choice_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    sim = simulate(outlier_llama(), "htp_v73")
    loader, run = batches() + batches(1), EndLoss.__call__
    whole = calibrate(sim, loader, config=FAST)
    calls, interruptions = [], []

    def interrupted(self):
        calls.append(run(self))
        if len(calls) == 4 and not interruptions:
            interruptions.append(calls[-1])
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(EndLoss, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(sim, loader, config=FAST, checkpoint_dir=tmp_path)
    set_ranges(sim, loader)  # trials set ranges anew: those that were do not count
    again = calibrate(sim, loader, config=FAST, checkpoint_dir=tmp_path)
    assert len(calls) == 1 + whole.choice.trials  # the fourth was lost
    assert again.choice.losses == whole.choice.losses
    assert again.choice.kept == whole.choice.kept
    assert all(torch.equal(a, whole.alphas[n]) for n, a in again.alphas.items())
    sim.model.lm_head.output_quantizers[0].bitwidth = 16
    calls.clear()
    other = calibrate(sim, loader, config=FAST, checkpoint_dir=tmp_path)
    assert len(calls) == other.choice.trials  # another sim, other losses


def _too_far(result):
    alpha = result.candidates["learned"]
    far = {"learned": alpha.square(), "halfway": alpha, "ones": torch.ones_like(alpha)}
    return replace(result, kept="learned", candidates=far, losses=dict.fromkeys(far, 1.0))


def test_an_alpha_that_harms_the_model_is_not_taken(monkeypatch):
    """The block's error says "learned"; the model's says no."""
    from aimet_quadapter.learning import calibration

    sim = simulate(prepare(llama()), "htp_v73")
    pairs = find_pairs(sim)
    learn, bad = calibration.Learner.learn, partial(torch.logspace, -3, 3)

    def harmful(self):
        return [
            replace(r, kept="learned", candidates=r.candidates | {"learned": bad(r.pair.channels)})
            for r in learn(self)
        ]

    monkeypatch.setattr(calibration.Learner, "learn", harmful)
    blocks = calibrate(sim, batches(), pairs, BLOCKS)
    assert {r.kept for r in blocks.results} == {"learned"}
    assert blocks.choice is None
    chosen = calibrate(sim, batches(), pairs, FAST)
    assert "learned" not in {r.kept for r in chosen.results}


def test_a_model_without_logits_is_compared_by_its_outputs():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(5, 8)
    sim = make_sim(model, x)
    result = calibrate(sim, [torch.randn(5, 8) for _ in range(4)], config=FAST)
    assert 0 < result.choice.loss <= min(result.choice.losses.values())
    set_ranges(sim, [x])
    got = sim.model(x)
    with remove_all_quantizers(sim.model):
        expected = sim.model(x)
    error = (got - expected).square().mean() / expected.square().mean()
    assert EndLoss(sim.model, [Sample.of(x)])() == pytest.approx(float(error), rel=1e-5)


def test_the_end_loss_is_the_divergence_and_may_forget_its_teacher():
    sim = simulate(prepare(llama()), "htp_v73")
    set_ranges(sim, batches())
    samples = as_samples(batches(seed=3), sim.model)
    with torch.no_grad():
        expected = sum(float(distillation(sim.model, s)) for s in samples) / len(samples)
    kept, forgetful = EndLoss(sim.model, samples), EndLoss(sim.model, samples)
    forgetful._left = 0
    for _ in range(2):
        assert kept() == pytest.approx(expected, rel=1e-5)
        assert forgetful() == pytest.approx(expected, rel=1e-5)


def test_what_is_not_kept_is_not_run_ahead(monkeypatch):
    sim = simulate(prepare(llama()), "htp_v73")
    set_ranges(sim, batches())
    samples = as_samples(batches(seed=3), sim.model)
    loss, runs = EndLoss(sim.model, samples), []
    loss._left = 0
    monkeypatch.setattr(loss, "_outputs", runs.append)
    loss.remember()
    assert not runs


def test_a_loss_that_is_no_number_loses():
    sim = simulate(prepare(llama()), "htp_v73")
    set_ranges(sim, batches())
    loss = EndLoss(sim.model, as_samples(batches(), sim.model))
    loss()
    sim.model.lm_head.output_quantizers[0] = nn.Threshold(math.inf, math.nan)
    assert loss() == math.inf


def test_samples_are_held_back_where_there_are_enough():
    def of(*lengths):
        return [Sample.of(tokens(1, length)) for length in lengths]

    few = of(4, 4, 4)
    assert held_back(few) == (few, few)
    four = of(4, 4, 4, 4)
    assert held_back(four) == (four[:3], four[3:])
    many = of(*[4] * 17)
    assert held_back(many) == (many[:15], many[15:])
    short = of(4, 4, 4, 1)  # the end of a text
    assert held_back(short) == ([short[0], short[1], short[3]], [short[2]])


def test_settings():
    assert CalibrationConfig.paper().choice == "block"
    with pytest.raises(ValueError, match="choice is 'pair'"):
        CalibrationConfig(choice="pair")


class Rows(nn.Module):
    """Floats (B, T, C) in, floats of three dimensions out: no language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_rows_of_floats_are_no_text():
    sim = make_sim(Rows(), torch.randn(2, 5, 6))
    result = calibrate(sim, [torch.randn(2, 5, 6) for _ in range(4)], config=FAST)
    assert 0 < result.choice.loss < 1


def test_a_sample_without_a_next_token_does_not_count():
    sim = simulate(prepare(llama()), "htp_v73")
    pairs = find_pairs(sim)
    short = tokens(1, 1)
    result = calibrate(sim, [*(tokens(1, 16, s) for s in range(7)), short], pairs, FAST)
    assert math.isfinite(result.choice.loss)
    set_ranges(sim, batches())
    with pytest.raises(DataError, match="token to predict"):
        EndLoss(sim.model, as_samples([short], sim.model))()


class TwoHeads(nn.Module):
    """The second head runs where the flag says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        if x.shape[0] == 3:
            return self.d(self.c(x).relu())
        return self.b(self.a(x).relu())


def test_a_pair_on_the_way_of_the_last_samples_alone_is_learned():
    sim = make_sim(TwoHeads(), torch.randn(2, 6))
    sim.compute_encodings(lambda m: [m(torch.randn(n, 6)) for n in (2, 3)])
    loader = [(torch.randn(n, 6),) for n in (2, 2, 2, 3)]
    pairs = find_pairs(sim, samples=loader)
    assert len(calibrate(sim, loader, pairs, FAST).results) == len(pairs) == 2
