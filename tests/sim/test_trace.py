"""Recording what a model computes."""

import pytest
import torch
from tiny import decoder_sim, llama
from torch import nn

from aimet_quadapter.sim.trace import recordings


class Branching(nn.Module):
    """Takes another way for each sign of its input's sum."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else torch.relu(self.linear(x))


@pytest.fixture
def runs():
    """Counts the forward passes of what it is called with."""
    count = []

    def watch(model):
        model.register_forward_pre_hook(lambda *_: count.append(1))
        return count

    return watch


def test_samples_of_one_shape_share_a_recording_where_the_graph_is_fixed(runs):
    model = decoder_sim(llama()).model
    count = runs(model)
    ids = torch.arange(48).reshape(6, 1, 8) % 90
    mask = torch.ones(1, 8, dtype=torch.long)
    samples = [*ids, ids[0][:, :5], (ids[1], mask), (ids[2], mask.bool())]
    traces = list(recordings(model, samples))
    assert len(count) == len({id(trace) for trace in traces}) == 4
    assert len({id(trace) for trace in traces[:6]}) == 1


def test_any_other_model_is_recorded_on_every_sample(runs):
    model = Branching()
    count = runs(model)
    one, other = recordings(model, [torch.ones(1, 4), -torch.ones(1, 4)])
    assert len(count) == 2
    assert one.form != other.form
