"""Stages leave a model as they found it, and know nothing of a channel that stayed silent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import FAST, make_sim
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import (
    analytic_alphas,
    apply_quadapter,
    calibrate,
    find_pairs,
    fold,
    set_ranges,
)
from aimet_quadapter.learning.analytic import Evidence, neutral


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def with_batch_norm() -> nn.Module:
    """A net whose running statistics a forward pass in train mode would move."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3),
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3),
    )
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    return net


def modes_and_buffers(model: nn.Module) -> tuple[dict[str, bool], dict[str, Tensor]]:
    modes = {n: m.training for n, m in model.named_modules()}
    return modes, {n: b.clone() for n, b in model.named_buffers()}


STAGES: dict[str, Any] = {
    "find_pairs": lambda sim: find_pairs(sim, images()),
    "calibrate": lambda sim: calibrate(sim, [images()], config=FAST),
    "analytic_alphas": lambda sim: analytic_alphas(sim, [images()], find_pairs(sim), "smoothquant"),
    "set_ranges": lambda sim: set_ranges(sim, [images()]),
    "apply_quadapter": lambda sim: apply_quadapter(sim, [images()], calibration=FAST),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_left_in_train_mode_is_run_in_eval_mode_and_given_back(stage: str) -> None:
    sim = make_sim(with_batch_norm(), images())
    sim.model.train()
    sim.model[3].eval()
    before = modes_and_buffers(sim.model)
    STAGES[stage](sim)
    after = modes_and_buffers(sim.model)
    assert after[0] == before[0]
    assert_close(after[1], before[1], rtol=0, atol=0)


def test_train_mode_learns_what_eval_mode_learns() -> None:
    alphas = []
    for training in (True, False):
        sim = make_sim(with_batch_norm(), images())
        sim.model.train(training)
        alphas.append(calibrate(sim, [images()], config=FAST).alphas)
    assert_close(alphas[0], alphas[1], rtol=0, atol=0)


def test_neutral_is_the_scaled_range_over_the_unscaled() -> None:
    alpha = torch.tensor([0.5, 0.25, 1.0, 1.0])
    seen = torch.tensor([2.0, 8.0, 0.0, 3.0])
    known = torch.tensor([True, True, False, False])
    assert_close(neutral(alpha, Evidence(seen, known)), torch.tensor([0.5, 0.25, 0.25, 0.25]))
    everything = torch.ones(4, dtype=torch.bool)
    assert_close(neutral(alpha, Evidence(seen, everything)), alpha)
    assert_close(neutral(alpha, Evidence(seen, ~everything)), alpha)


def silent_net(channel: int) -> nn.Module:
    """A norm and a linear; one input feature makes the channel silent or wakes it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with torch.no_grad():
        net[0].weight.mul_(50)
        net[0].bias.zero_()
        net[0].weight[channel] = 0
        net[0].weight[channel, 5] = 40.0
    return net


@pytest.mark.parametrize("start", ["best", "ones", "cle", "smoothquant"])
def test_a_channel_that_wakes_is_no_worse_off_than_without_alpha(start: str) -> None:
    channel = 2
    generator = torch.Generator().manual_seed(3)
    calibration = torch.randn(64, 6, generator=generator)
    calibration[:, 5] = -1.0  # the channel's ReLU stays at 0
    awake = torch.randn(64, 6, generator=generator)
    awake[:, 5] = 1.0
    expected = silent_net(channel)(awake)

    def error(scaled: bool) -> float:
        sim = make_sim(silent_net(channel), calibration[:1])
        if scaled:
            pairs = find_pairs(sim)
            config = dataclasses.replace(FAST, start=start)
            fold(sim, pairs, calibrate(sim, [calibration], pairs, config).alphas)
        set_ranges(sim, [calibration])
        with torch.no_grad():
            return float((sim.model(awake) - expected).square().mean())

    assert error(scaled=True) <= 1.2 * error(scaled=False)
