"""AIMET GenAILab's technique, on a stand-in of its generator: the real one is in no package.

What the stand-in keeps to, as read in AIMET's sources: `apply(quantsim, generator, dataloader,
num_iterations, **kwargs)` is called with a sim of HuggingFace's own model, a generator that is
called with a batch's entries and calls the sim's model with pieces of it, and a loader of dicts.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from tiny import assert_same, batches, llama, state, tokens
from torch import Tensor
from torch.testing import assert_close

from aimet_quadapter import DataError
from aimet_quadapter.integrations.genailab import QuadapterTechnique, inputs_of
from aimet_quadapter.models.stock import LogitsOnly


class StandIn:
    """Calls the sim's model with pieces of a batch, as a generator does while it prefills."""

    device = torch.device("cpu")

    def __init__(self, sim: Any, piece: int = 16) -> None:
        self.sim, self.piece = sim, piece

    def __call__(self, input_ids: Tensor, labels: Any = None) -> list[Tensor]:
        return [self.sim.model(x) for x in input_ids.split(self.piece, dim=1)]


def loader() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": None} for ids in batches()]


def sim_with_outliers() -> QuantizationSimModel:
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 100.0
    return QuantizationSimModel(LogitsOnly(model), tokens())


def test_it_learns_on_what_the_generator_feeds_and_folds() -> None:
    sim = sim_with_outliers()
    with remove_all_quantizers(sim.model), torch.no_grad():
        expected = sim.model(tokens()).as_subclass(Tensor)
    before = state(sim)
    QuadapterTechnique.apply(
        quantsim=sim, generator=StandIn(sim), dataloader=loader(), num_iterations=2, precision="w8"
    )
    with remove_all_quantizers(sim.model), torch.no_grad():
        assert_close(sim.model(tokens()).as_subclass(Tensor), expected, atol=1e-4, rtol=0)
    weight = "model.model.layers.0.input_layernorm.weight"
    assert not torch.equal(state(sim)[weight], before[weight])
    assert all(q.is_initialized() for q in sim.quantizers())

    plain = sim_with_outliers()
    plain.compute_encodings(lambda model: [model(x["input_ids"]) for x in loader()])
    with torch.no_grad():
        lost = [(s.model(tokens()) - expected).square().mean() for s in (plain, sim)]
    assert lost[1] < lost[0] / 2


def test_samples_are_the_pieces_and_copies_of_them() -> None:
    sim = sim_with_outliers()
    found = inputs_of(sim, StandIn(sim, piece=16), loader(), 2)
    assert [x.shape for sample in found for x in sample.tensors()] == [(2, 16)] * 4
    pieces = [x for ids in batches() for x in ids.split(16, dim=1)]
    assert all(torch.equal(s.args[0], x) for s, x in zip(found, pieces, strict=True))
    assert len(inputs_of(sim, StandIn(sim), loader(), 1)) == 2


@pytest.mark.parametrize(("generator", "data"), [(None, []), (lambda **_: None, loader())])
def test_nothing_to_learn_on_is_refused_and_the_sim_is_as_it_was(generator, data) -> None:
    sim = sim_with_outliers()
    before = state(sim)
    with pytest.raises(DataError, match="did not call the sim's model"):
        QuadapterTechnique.apply(sim, generator or StandIn(sim), data)
    assert_same(sim, before)
    assert not sim.model._forward_pre_hooks


def test_its_parameters_are_those_that_a_spec_declares() -> None:
    """GenAILab compares them with the fields of the spec when a technique is registered."""
    fixtures = {"quantsim", "generator", "dataloader", "kwargs"}
    found = set(inspect.signature(QuadapterTechnique.apply).parameters) - fixtures
    assert found == {"num_iterations"}
