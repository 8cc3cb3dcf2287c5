"""Phase 2 and quantization-aware training as a user calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import remove_all_quantizers
from tiny import assert_same, batches, logits, outlier_gpt2, outlier_llama, ready, state
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import (
    DataError,
    FinetuneConfig,
    SimError,
    detach,
    find_pairs,
    finetune,
    fold,
)
from aimet_quadapter.learning import finetuning
from aimet_quadapter.pairs.attachment import attached_modules, is_attached
from aimet_quadapter.sim.inputs import Sample
from aimet_quadapter.sim.losses import cross_entropy


def interrupted() -> Iterator[Tensor]:
    """A loader that dies after its first batch."""
    yield batches()[0]
    raise KeyboardInterrupt


def test_phase_2_moves_alpha_and_ranges_and_not_the_weights():
    sim = ready()
    pairs = find_pairs(sim)
    weights = {n: p.clone() for n, p in sim.model.named_parameters() if "quantizers" not in n}
    ranges = {n: p.clone() for n, p in sim.named_quantizer_parameters()}
    flags = {n: p.requires_grad for n, p in sim.model.named_parameters()}
    result = finetune(sim, batches(), pairs, config=FinetuneConfig(steps=3))
    for name, parameter in sim.model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]), name
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None
    moved = [n for n, p in sim.named_quantizer_parameters() if not torch.equal(p, ranges[n])]
    assert len(moved) > 0.8 * len(ranges) * 0.5
    assert all((a != 1).any() for a in result.alphas.values())
    assert is_attached(sim)
    detach(sim)
    assert not is_attached(sim)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "distillation"},
        {"accumulate": 2},
        {"checkpointing": True},
        {"autocast": "bfloat16"},
        {"parametrization": "plain", "log_ranges": False},
        {"lr_ranges": 0.0},
        {"lr_alpha": 0.0},
    ],
)
def test_every_setting_of_phase_2_trains(changes):
    sim = ready()
    result = finetune(sim, batches(), find_pairs(sim), config=FinetuneConfig(steps=2, **changes))
    assert len(result.curve) == 2
    fold(sim)
    assert logits(sim).isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"lr_alpha": 0.0, "lr_weights": 1e-3}])
def test_on_step_sees_the_sim_as_the_steps_before_left_it(changes):
    sim, data, seen = ready(), batches(), []

    def look(step: int) -> None:
        seen.append((step, float(cross_entropy(sim.model, Sample.of(data[step % len(data)])))))

    config = FinetuneConfig(steps=3, **changes)
    pairs = find_pairs(sim) if config.lr_alpha else []
    assert finetune(sim, data, pairs, config=config, on_step=look).curve == seen
    assert len({loss for _, loss in seen}) == len(seen)


@pytest.mark.parametrize("build", [outlier_gpt2, outlier_llama])
@pytest.mark.parametrize("changes", [{}, {"lr_ranges": 0.0}, {"loss": "distillation"}])
def test_steps_by_parts_and_rows_are_aimets(build, changes, monkeypatch):
    found = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(finetuning, "_same_for_less", lambda *_: nullcontext())
        sim = ready(build)
        result = finetune(sim, batches(), find_pairs(sim), config=FinetuneConfig(3, **changes))
        trained = {n: p.detach() for n, p in sim.named_quantizer_parameters()}
        found.append((result.alphas | trained, result.curve))
    (values, curve), (expected, wanted) = found
    assert curve[0] == wanted[0]  # the forward pass to the bit
    tolerance = 5e-6 if "lr_ranges" not in changes else 0.0  # sums over parts
    for name, value in values.items():
        assert_close(value, expected[name], rtol=tolerance, atol=0.0)
    for (_, loss), (_, other) in zip(curve, wanted, strict=True):
        assert loss == pytest.approx(other, rel=tolerance, abs=0.0)


@pytest.mark.parametrize("lr_ranges", [1e-2, 0.0])
def test_frozen_weights_are_quantized_once_and_tables_by_rows(lr_ranges, monkeypatch):
    sim, seen = ready(), []
    forward = QuantizeDequantize.forward

    def noted(self, x):
        seen.append((id(self), x.shape))
        return forward(self, x)

    monkeypatch.setattr(QuantizeDequantize, "forward", noted)
    pair = find_pairs(sim)[0]
    seen.clear()
    finetune(sim, batches(), [pair], config=FinetuneConfig(steps=3, lr_ranges=lr_ranges))
    modules = dict(sim.model.named_modules())
    carrying = {id(modules[name]) for name in attached_modules(sim)}
    for module in modules.values():
        q = dict(getattr(module, "param_quantizers", {})).get("weight")
        if q is not None:
            shapes = [shape for i, shape in seen if i == id(q)]
            table = isinstance(module, nn.Embedding)
            once = not lr_ranges and not table and id(module) not in carrying
            assert len(shapes) == (1 if once else 3)
            assert (shapes[0] == module.weight.shape) != table


def test_checkpointing_changes_memory_not_numbers():
    curves = []
    for checkpointing in (False, True):
        sim = ready()
        config = FinetuneConfig(steps=3, checkpointing=checkpointing)
        curves.append(finetune(sim, batches(), find_pairs(sim), config=config).curve)
    for (_, one), (_, other) in zip(*curves, strict=True):
        assert one == pytest.approx(other)


def test_plain_alpha_steps_on_the_whole_alpha():
    sim = ready()
    pairs = find_pairs(sim)[:1]
    base = {pairs[0].name: torch.full((pairs[0].channels,), 4.0)}
    config = FinetuneConfig(steps=1, parametrization="plain", lr_alpha=0.4, lr_ranges=0.0)
    factor = finetune(sim, batches(), pairs, base, config).alphas[pairs[0].name]
    moved = (factor - 1).abs()  # Adam's first step is lr where the gradient is not tiny
    assert float(moved.max()) == pytest.approx(0.4 / 4, rel=0.02)


def test_log_ranges_move_by_a_share_of_themselves():
    sim = ready()
    before = {n: p.detach().clone() for n, p in sim.named_quantizer_parameters()}
    config = FinetuneConfig(steps=1, lr_ranges=0.01, lr_alpha=0.0)
    finetune(sim, batches(), [], config=config)
    for name, parameter in sim.named_quantizer_parameters():
        share = (parameter.detach() / before[name])[before[name] != 0]
        assert ((share > 0.985) & (share < 1.015)).all(), name


def test_phase_2_that_dies_leaves_the_sim_as_it_was():
    sim = ready()
    before = state(sim)
    with pytest.raises(KeyboardInterrupt):
        finetune(sim, interrupted(), find_pairs(sim), config=FinetuneConfig(steps=4))
    assert_same(sim, before)
    assert not is_attached(sim)
    with pytest.raises(DataError, match="yields no batches"):
        finetune(sim, [], find_pairs(sim), config=FinetuneConfig(steps=4))
    assert_same(sim, before)


def test_qat_trains_weights_and_ranges_as_asked():
    for lr_ranges in (1e-2, 0.0):
        sim = ready()
        quantizers = {n for n, _ in sim.named_quantizer_parameters()}
        before = {n: p.detach().clone() for n, p in sim.model.named_parameters()}
        config = FinetuneConfig.qat(steps=3, lr_weights=1e-3, lr_ranges=lr_ranges)
        result = finetune(sim, batches(), [], config=config)
        assert result.alphas == {}
        assert not is_attached(sim)
        moved = {n for n, p in sim.model.named_parameters() if not torch.equal(p, before[n])}
        assert {n for n in before if n not in quantizers} <= moved
        assert bool(moved & quantizers) == (lr_ranges > 0)


def test_qat_of_a_model_without_quantizers_is_plain_fine_tuning():
    sim = ready()
    remove_all_quantizers(sim.model)
    before = {n: p.detach().clone() for n, p in sim.model.named_parameters()}
    config = FinetuneConfig.qat(steps=30, lr_weights=1e-2)
    result = finetune(sim, batches(), [], config=config)
    assert result.curve[-1][1] < result.curve[0][1]
    assert all(not torch.equal(p, before[n]) for n, p in sim.model.named_parameters())
    with pytest.raises(SimError, match="every quantizer of the sim is off"):
        finetune(sim, batches(), [], config=FinetuneConfig(steps=1))


def test_nothing_to_train_is_refused():
    sim = ready()
    before = state(sim)
    with pytest.raises(SimError, match="nothing to train"):
        finetune(sim, batches(), [], config=FinetuneConfig(steps=1, lr_ranges=0.0))
    assert_same(sim, before)


def test_qat_that_dies_gives_the_weights_back():
    sim = ready()
    before = state(sim)
    with pytest.raises(KeyboardInterrupt):
        finetune(sim, interrupted(), [], config=FinetuneConfig.qat(steps=5, lr_weights=1e-2))
    assert_same(sim, before)
