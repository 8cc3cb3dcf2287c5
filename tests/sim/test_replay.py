"""A recording gone through again gives what the model gives, in parts, each part once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aimet_torch.utils import remove_all_quantizers
from families import FAMILIES
from tiny import decoder_sim, llama
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aimet_quadapter import CalibrationConfig, calibrate
from aimet_quadapter.sim.inputs import Sample
from aimet_quadapter.sim.replay import Replay
from aimet_quadapter.sim.trace import is_leaf, record


def calls(model: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, Tensor]]:
    """Each leaf that `run` calls, and a copy of what it gave."""
    found: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        found.append((module, next(x for x in tree_leaves(out) if isinstance(x, Tensor)).clone()))

    handles = [m.register_forward_hook(note) for m in model.modules() if is_leaf(m)]
    with torch.no_grad(), remove_all_quantizers(model):
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_what_the_model_gives_in_parts_and_each_part_once(family: str) -> None:
    model = decoder_sim(FAMILIES[family]()).model
    sample = Sample.of(model.dummy_input(batch=2))
    trace = record(model, sample)
    nodes = [node for node in trace.nodes if node.module is not None]
    firsts = [node.outputs[0].index for node in nodes]
    replay, got = Replay(model, trace, sample), {}
    thirds = [len(trace.nodes) // 3, 2 * len(trace.nodes) // 3, len(trace.nodes) - 1]

    def in_parts() -> None:
        for stop in thirds:
            done = {n.outputs[0].index for n in nodes if n.index <= stop} - got.keys()
            got.update(replay.until(stop, done, set(firsts) - got.keys() - done))

    replayed = calls(model, in_parts)
    expected = calls(model, lambda: sample(model))
    assert [id(module) for module, _ in replayed] == [id(module) for module, _ in expected]
    for index, (_, value) in zip(firsts, expected, strict=True):
        assert torch.equal(got[index], value)


class InPlace(nn.Module):
    """Writes into what it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x.mul_(3.0)
        y[:, 0] = x[:, 1]
        y.add_(1.0)
        return self.second(y) + x


def test_a_value_is_kept_as_it_was_when_it_was_made() -> None:
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(2, 4)
    trace = record(model, x)
    replay = Replay(model, trace, Sample.of(x))
    before = x.clone()
    last = trace.nodes[-1]
    first = next(n for n in trace.nodes if n.module is model.first).outputs[0].index
    kept = replay.until(len(trace.nodes) - 1, {0, first, last.outputs[0].index}, ())
    torch.testing.assert_close(kept[0], before, rtol=0, atol=0)
    torch.testing.assert_close(kept[first], model.first(before), rtol=0, atol=0)
    out = kept[last.outputs[0].index]
    torch.testing.assert_close(out, model(before.clone()), rtol=0, atol=0)
    assert torch.equal(x, before)  # the caller's own is left alone


def test_blocks_of_many_groups_go_through_the_model_once() -> None:
    sim = decoder_sim(llama(3))
    samples = [torch.randint(0, 90, (1, 8)) for _ in range(4)]

    def passes(budget: int) -> int:
        config = CalibrationConfig(steps=0, choice="block", capture_bytes=budget)
        return embeddings(sim, lambda: calibrate(sim, samples, config=config))

    assert passes(1) == passes(1 << 29)


def embeddings(sim: Any, run: Callable[[], Any]) -> int:
    """Forward passes: how often the table of the embeddings was read."""
    seen: Counter[str] = Counter()
    table = next(m for m in sim.model.modules() if isinstance(m, nn.Embedding))
    handle = table.register_forward_hook(lambda *_: seen.update("x"))
    run()
    handle.remove()
    return seen["x"]
