"""What phase 1 is said to take, beside what it does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    BLOCKS,
    FAST,
    assert_same,
    batches,
    decoder_sim,
    llama,
    outlier_gpt2,
    outlier_llama,
    ready,
    state,
)

from aimet_quadapter import calibrate, find_pairs
from aimet_quadapter.learning.blocks import block_sizes, capture, ways
from aimet_quadapter.learning.choice import expected_trials
from aimet_quadapter.learning.cost import phase_1_cost
from aimet_quadapter.sim.samples import as_samples


@pytest.mark.parametrize("choice", ["kind", "layer"])
@pytest.mark.parametrize("build", [outlier_gpt2, outlier_llama])
def test_the_trials_of_a_choice_are_about_as_many_as_expected(build, choice):
    sim = ready(build)
    pairs = find_pairs(sim)
    done = calibrate(sim, batches(), pairs, replace(FAST, steps=5, choice=choice)).choice
    kinds = Counter(pair.kind for pair in pairs)
    expected = sum(expected_trials(kinds, 5, choice == "layer"))
    assert expected / 1.5 <= done.trials <= expected * 1.5


def test_a_choice_of_one_kind_compares_nothing_again():
    assert expected_trials({"v-o": 4}, 5, by_layer=False) == (6, 0)
    assert expected_trials({"v-o": 4, "up-down": 2}, 5, by_layer=False) == (7, 2 * 4)
    assert expected_trials({"v-o": 9}, 5, by_layer=True) == (8, 4 * 4)
    assert expected_trials({"v-o": 4, "up-down": 2}, 5, False, processes=4) == (2 + 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_blocks_hold_is_known_before_they_are_recorded(dtype):
    sim = decoder_sim(llama().to(dtype))
    samples = as_samples(batches(), sim.model)
    pairs = tuple(find_pairs(sim))
    sizes = block_sizes(pairs, ways(sim, samples))
    (group,) = capture(sim, pairs, samples, 1 << 30)
    assert sizes == [sum(x.nbytes for x in block.inputs) for block in group]


@pytest.mark.parametrize("objective", ["block", "layer"])
def test_every_pair_is_in_a_unit_that_was_measured(objective):
    """And the sim is left as it is."""
    sim = ready(outlier_llama)
    before = state(sim)
    samples = as_samples(batches(), sim.model)
    pairs = tuple(find_pairs(sim))
    cost = phase_1_cost(sim, samples, pairs, replace(FAST, objective=objective))
    names = [name for unit in cost.units for of in unit.pairs for name in of]
    assert sorted(names) == sorted(pair.name for pair in pairs)
    kinds = {pair.kind for pair in pairs}
    assert len(cost.units) == (len(kinds) if objective == "block" else 2)  # a layer, and the head
    assert all(unit.seconds > 0 and unit.extra > 0 for unit in cost.units)
    assert cost.trials == sum(expected_trials(Counter(p.kind for p in pairs), 5, False))
    assert cost.seconds > cost.choosing > 0
    assert_same(sim, before)


def test_steps_and_samples_are_counted():
    """A hundred times the steps of what is measured once, and no trials for blocks alone."""
    sim = ready(outlier_gpt2)
    samples = as_samples(batches(), sim.model)
    pairs = tuple(find_pairs(sim))
    few, many = (phase_1_cost(sim, samples, pairs, replace(BLOCKS, steps=n)) for n in (5, 5000))
    assert many.seconds > 20 * few.seconds
    assert (few.trials, few.choosing) == (0, 0.0)
    more = phase_1_cost(sim, samples * 8, pairs, BLOCKS)
    assert more.extra == 8 * few.extra


def test_what_several_processes_learn_is_divided():
    sim = ready(outlier_gpt2)
    samples = as_samples(batches(), sim.model)
    cost = phase_1_cost(sim, samples, tuple(find_pairs(sim)), BLOCKS, processes=4)
    learning = sum(unit.seconds * len(unit.pairs) for unit in cost.units)
    assert cost.seconds == pytest.approx(cost.capture + learning / 4)


def test_what_lies_in_checkpoints_is_not_promised_again(tmp_path: Path):
    sim = ready(outlier_gpt2)
    samples = as_samples(batches(), sim.model)
    pairs = tuple(find_pairs(sim))
    cost = phase_1_cost(sim, samples, pairs, FAST)
    assert cost.stored(tmp_path) == (0, 0, 0.0)
    calibrate(sim, batches(), pairs, FAST, tmp_path)
    blocks, trials, seconds = cost.stored(tmp_path)
    assert blocks == len(pairs)
    assert 6 <= trials <= cost.trials
    learning = sum(unit.seconds * len(unit.pairs) for unit in cost.units)
    assert seconds == pytest.approx(learning + trials / cost.trials * cost.choosing)
    assert seconds < cost.seconds
