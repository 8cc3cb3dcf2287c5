"""Whatever the graph: α folded into all pairs that are found leaves its output what it was."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from hypothesis import HealthCheck, assume, given, reject, seed, settings
from random_graphs import Graph, RandomModel, graphs, inputs, ways
from random_operations import FLAT, LINE, MAP, SEQ, Op
from torch import Tensor

from aimet_quadapter import find_pairs, fold
from aimet_quadapter.errors import QuadapterError
from aimet_quadapter.models import norms  # noqa: F401  makes nn.RMSNorm known to AIMET
from aimet_quadapter.pairs.pair import Pair, Pairs
from aimet_quadapter.sim.trace import tensors_in

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # AIMET traces `if`s

EXACT = 1e-4
"""Largest |difference| / max |output|.

Everything is computed in float64. Random graphs amplify: in float32 some of them would move by more
than this when nothing but the order of a sum changes, while a scale that is wrong in one channel
moves them by much more in any type.
"""

DRAWN = settings(deadline=None, suppress_health_check=list(HealthCheck))


def samples_of(graph: Graph) -> list[dict[str, Any]]:
    return [inputs(graph, way, number) for way in ways(graph) for number in range(2)]


def unseen(graph: Graph) -> list[dict[str, Any]]:
    """Other lengths, batch sizes and values, on each way that the samples take."""
    kinds = ((7, 4.0), (12, 0.3))
    return [inputs(graph, way, number, loud) for way in ways(graph) for number, loud in kinds]


def run(model: Any, sample: dict[str, Any]) -> list[Tensor]:
    fresh = {k: v.clone() if isinstance(v, Tensor) else v for k, v in sample.items()}
    return tensors_in(model(**fresh))


@torch.no_grad()
def sim_of(graph: Graph, seen: Counter[str]) -> QuantizationSimModel:
    """The sim of a graph; a graph that does not run, or not in AIMET, is not counted."""
    model = RandomModel(graph).double().eval()
    samples = [*samples_of(graph), *unseen(graph)]
    if not all(bool(y.isfinite().all()) for sample in samples for y in run(model, sample)):
        seen["not finite"] += 1
        reject()
    try:
        return QuantizationSimModel(model, samples[0]["x"].clone())
    except Exception:  # noqa: BLE001  AIMET refuses some graphs in ways of its own
        seen["not for AIMET"] += 1
        reject()


def pairs_of(sim: Any, graph: Graph) -> Pairs:
    if graph.samples or graph.conditions:
        return find_pairs(sim, samples=samples_of(graph))
    return find_pairs(sim)


@torch.no_grad()
def moved(sim: Any, graph: Graph, pairs: Iterable[Pair]) -> float:
    """By what share of its largest value an output moves when random α go into the weights."""
    pairs = tuple(pairs)
    generator = torch.Generator().manual_seed(graph.seed + 1)
    alphas = {
        p.name: torch.exp((torch.rand(p.channels, generator=generator) * 2 - 1) * math.log(10))
        for p in pairs
    }
    samples = unseen(graph)
    with remove_all_quantizers(sim.model):
        before = [y for sample in samples for y in run(sim.model, sample)]
        fold(sim, pairs, alphas)
        after = [y for sample in samples for y in run(sim.model, sample)]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))
        for a, b in zip(after, before, strict=True)
    )


def check(graph: Graph, seen: Counter[str]) -> None:
    """Nothing but the package's own errors, and no output that moves."""
    sim = sim_of(graph, seen)
    seen["graphs"] += 1
    try:
        pairs = pairs_of(sim, graph)
    except QuadapterError as e:
        seen["refused"] += 1
        seen[f"refused: {e}"] += 1
        return
    seen.update(pairs.counts())
    seen["with pairs"] += bool(pairs)
    difference = moved(sim, graph, pairs)
    assert difference <= EXACT, f"{difference:.2g}\n{pairs}"


KINDS = {
    SEQ: {"linear-linear", "linear-relu-linear", "norm-linear", "norm-head", "up-down", "v-o"},
    FLAT: {"linear-linear", "linear-relu-linear", "norm-linear", "norm-conv", "up-down"},
    LINE: {"conv-conv", "conv-relu-conv", "norm-conv", "up-down"},
    MAP: {"conv-conv", "conv-relu-conv", "norm-conv", "up-down"},
}
"""Layout of the input → kinds of pairs that its graphs hold among others."""


def assert_telling(seen: Counter[str], kinds: set[str]) -> None:
    """The graphs that were drawn are such that a wrong pair would have shown."""
    assert seen["with pairs"] >= 0.3 * seen["graphs"], seen
    assert seen["refused"] <= 0.02 * seen["graphs"], seen
    assert seen["not finite"] + seen["not for AIMET"] <= 0.3 * seen["graphs"], seen
    assert not [kind for kind in kinds if not seen[kind]], seen


@pytest.mark.parametrize("layout", KINDS)
def test_random_graphs_stay_what_they_were(layout: str) -> None:
    seen: Counter[str] = Counter()

    @seed(list(KINDS).index(layout))
    @settings(DRAWN, max_examples=125, database=None)
    @given(graphs((layout,)))
    def each(graph: Graph) -> None:
        check(graph, seen)

    each()
    print(seen)
    assert_telling(seen, KINDS[layout])


@pytest.mark.slow
def test_many_random_graphs_stay_what_they_were() -> None:
    seen: Counter[str] = Counter()
    number = random.SystemRandom().randrange(2**32)
    print(f"hypothesis.seed({number})")

    @seed(number)
    @settings(DRAWN, max_examples=5000, print_blob=True)
    @given(graphs(tuple(KINDS)))
    def each(graph: Graph) -> None:
        check(graph, seen)

    each()
    print(seen)
    assert_telling(seen, set.union(*KINDS.values()))


def test_a_wrong_fold_would_show() -> None:
    """Without one of their scales pairs move the output, unless nothing reads their consumers."""
    seen: Counter[str] = Counter()

    @settings(DRAWN, max_examples=40, derandomize=True)
    @given(graphs(tuple(KINDS)))
    def each(graph: Graph) -> None:
        sim = sim_of(graph, seen)
        pairs = pairs_of(sim, graph)
        assume(pairs)
        seen["graphs"] += 1
        half = [dataclasses.replace(pair, scales=pair.scales[:-1]) for pair in pairs]
        seen["shown"] += moved(sim, graph, half) > EXACT

    each()
    assert seen["shown"] >= 0.8 * seen["graphs"] > 0, seen


FAILED = {
    "a sim whose first parameter is a quantizer's": Graph((Op("homogeneous"),), samples=False),
    "a layer that reads a vector": Graph((Op("weighted"), Op("pool", way=1)), FLAT),
    "a matrix times a vector": Graph((Op("weighted"), Op("pool", way=2)), FLAT),
    "a vector times a matrix": Graph((Op("weighted"), Op("pool", way=3)), FLAT),
    "a layer that makes nothing": Graph((Op("rest", size=4),)),
    "a layer that reads nothing": Graph((Op("weighted"), Op("rest", size=4))),
    "an input that the model changes": Graph(
        (Op("weighted"), Op("weighted"), Op("product", source=2, way=5))
    ),
    "ways that differ in a number": Graph(
        (Op("weighted"), Op("part", when=0)), conditions=("flag",)
    ),
    "a way that only whole batches take": Graph(
        (Op("weighted", when=0), Op("again")), conditions=("batch",)
    ),
}
"""What random graphs have found, shrunk: each raised an error not the package's, or moved."""


@pytest.mark.parametrize("name", FAILED)
def test_a_graph_that_failed_once_does_not_again(name: str) -> None:
    seen: Counter[str] = Counter()
    check(FAILED[name], seen)
    assert not seen["refused"], seen
