"""Small random graphs as data: drawn by Hypothesis, read by people, run as models.

A `Graph` is a list of `Op`s. Each op reads values that earlier ones made, counted backwards from
the newest, and everything that an op cannot be is made what it can be: a second operand of another
shape is the first one instead, an op that nothing fits is left out. So every description is a
model, and Hypothesis can take any op out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from random_operations import FLAT, LINE, MAP, OPS, SEQ, Built, Op, Type
from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A model.

    Attributes:
        ops: its operations, in order.
        layout, channels: of its input.
        conditions: what it branches on; see `CONDITIONS`.
        head: whether a linear or convolution stands at the end.
        outputs: for each value that it returns besides its last, how many are newer.
        samples: whether `find_pairs` is given samples, or the input the sim was made with.
        seed: of its weights and inputs.
    """

    ops: tuple[Op, ...]
    layout: str = SEQ
    channels: int = 4
    conditions: tuple[str, ...] = ()
    head: bool = True
    outputs: tuple[int, ...] = ()
    samples: bool = True
    seed: int = 0


CONDITIONS = ("flag", "extra", "batch", "length", "sign")
"""Python's True, an optional tensor, more than 2 rows, more than 4 places, a sum above 0."""


class RandomModel(nn.Module):
    """The model that a `Graph` describes."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        torch.manual_seed(graph.seed)
        self.graph = graph
        self.types = [Type(graph.layout, graph.channels)]
        self.weighted: list[tuple[str, Type, Type]] = []
        self.steps: list[Callable[[Any, list[Tensor], tuple[bool, ...]], Tensor]] = []
        for op in graph.ops:
            self._append(op)
        if graph.head:
            self._append(Op("weighted", size=2))
        noise = torch.Generator().manual_seed(graph.seed)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():  # no bias at 0, no norm's weight at 1
                tensor.data += 0.2 * torch.rand(tensor.shape, generator=noise)

    def own(self, module: nn.Module) -> str:
        """Take a module in, return its name."""
        name = f"{type(module).__name__.lower()}_{len(self._modules)}"
        self.add_module(name, module)
        return name

    def own_buffer(self, tensor: Tensor) -> str:
        """Take a tensor in, return its name."""
        name = f"buffer_{len(self._buffers)}"
        self.register_buffer(name, tensor)
        return name

    def pick(self, back: int, fits: Callable[[Type], bool]) -> int | None:
        """Place of the `back`-th newest value that fits; the oldest such if there are fewer."""
        places = [i for i, t in enumerate(self.types) if fits(t)]
        return places[-1 - min(back, len(places) - 1)] if places else None

    def _append(self, op: Op) -> None:
        make, fits = OPS[op.name]
        source = self.pick(op.source, fits)
        if source is None:
            return
        kind = self.types[source]
        alike = [i for i, t in enumerate(self.types) if t == kind and i != source]
        other = alike[-1 - min(op.other, len(alike) - 1)] if alike else source
        built = make(self, op, kind)
        twin = self._twin(op, kind, built) if op.when is not None else None
        place = (op.when or 0) % max(1, len(self.graph.conditions))

        def step(m: Any, values: list[Tensor], truths: tuple[bool, ...]) -> Tensor:
            chosen = built if twin is None or truths[place] else twin
            return chosen.run(m, [values[source], values[other]])

        self.types.append(built.type)
        self.steps.append(step)

    def _twin(self, op: Op, kind: Type, built: Built) -> Built | None:
        if not self.graph.conditions:
            return None
        if op.skip and built.type == kind:
            return Built(lambda m, xs: xs[0], kind)
        make, _ = OPS[op.name]
        for size in (op.size + 1, op.size):
            before = set(self._modules), set(self._buffers), len(self.weighted)
            twin = make(self, replace(op, size=size), kind)
            if twin.type == built.type:
                return twin
            self._forget(*before)
        return None

    def _forget(self, modules: set[str], buffers: set[str], weighted: int) -> None:
        """Drop all but these: what a twin that does not fit has brought."""
        for name in set(self._modules) - modules:
            del self._modules[name]
        for name in set(self._buffers) - buffers:
            del self._buffers[name]
        del self.weighted[weighted:]

    def forward(self, x: Tensor, flag: bool = False, extra: Tensor | None = None) -> Any:
        length = x.shape[{SEQ: 1, FLAT: 1}.get(self.graph.layout, 2)]
        found: dict[str, Callable[[], bool]] = {
            "flag": lambda: flag,
            "extra": lambda: extra is not None,
            "batch": lambda: x.shape[0] > 2,
            "length": lambda: length > 4,
            "sign": lambda: bool(x.sum() > 0),
        }
        truths = tuple(found[c]() for c in self.graph.conditions)
        values = [x]
        for step in self.steps:
            values.append(step(self, values, truths))
        others = [values[-2 - min(back, len(values) - 2)] for back in self.graph.outputs]
        return (values[-1], others) if others else values[-1]


def ways(graph: Graph) -> Iterator[dict[str, bool]]:
    """Every combination of the conditions."""
    for truths in itertools.product((False, True), repeat=len(graph.conditions)):
        yield dict(zip(graph.conditions, truths, strict=True))


def inputs(graph: Graph, way: dict[str, bool], number: int, loud: float = 1.0) -> dict[str, Any]:
    """Inputs that take one way: the `number`-th of these, with values up to about 3 · `loud`.

    Numbers differ in batch size and length too where no condition says what they are.
    """
    generator = torch.Generator().manual_seed(1000 * graph.seed + number)
    batch, length = 1 + number % 4, 3 + number % 5
    if "batch" in way:
        batch = (3 if way["batch"] else 1) + number % 2
    if "length" in way:
        length = (5 if way["length"] else 3) + number % 2
    shape = {
        SEQ: (batch, length, graph.channels),
        FLAT: (batch, graph.channels),
        LINE: (batch, graph.channels, length),
        MAP: (batch, graph.channels, length, length),
    }[graph.layout]
    x = loud * torch.randn(shape, generator=generator, dtype=torch.float64)
    if "sign" in way:  # each row for itself too, should the batch be split
        x = x.abs() if way["sign"] else -x.abs()
    given: dict[str, Any] = {"x": x}
    if way.get("flag"):
        given["flag"] = True
    if way.get("extra"):
        given["extra"] = torch.ones(batch, dtype=torch.float64)
    return given


COMMON = {"weighted": 9, "norm": 4, "homogeneous": 5, "attention": 2, "moved": 2}

NAMES = tuple(name for name in ("weighted", *OPS) for _ in range(COMMON.get(name, 1)))
"""Drawn from: without a layer there is no pair."""


def graphs(layouts: tuple[str, ...], most: int = 8) -> st.SearchStrategy[Graph]:
    """Graphs of up to so many operations, of inputs of these layouts.

    Drawn through a `Random` of Hypothesis, which shrinks as well as its strategies do. Of these it
    would make five near copies of each graph, which find less than five others.
    """

    def op(rng: Random) -> Op:
        reads, way = rng.randrange(12), rng.randrange(42)  # few numbers: it shrinks in fives
        when = rng.choice((None, None, None, 0, 1, 2, 3))
        return Op(
            name=rng.choice(NAMES),
            source=max(0, reads % 4 - 1),
            other=reads // 4,
            size=way // 7,
            way=way % 7,
            when=None if when is None else when // 2,
            skip=when is not None and when % 2 == 1,
        )

    def graph(rng: Random) -> Graph:
        layout = rng.choice(layouts)
        possible = [c for c in CONDITIONS if (layout, c) != (FLAT, "length")]
        branches = list(itertools.combinations(possible, rng.choice((0, 0, 1, 1, 2))))
        ops = [op(rng)]
        while len(ops) < most and rng.randrange(most):
            ops.append(op(rng))
        return Graph(
            ops=tuple(ops),
            layout=layout,
            channels=rng.choice((4, 3, 2)),
            conditions=rng.choice(branches),
            head=rng.choice((True, True, False)),
            outputs=rng.choice(((), (), (), (0,), (1, 2))),
            samples=rng.choice((True, False)),
            seed=rng.randrange(10),
        )

    return st.randoms(use_true_random=False).map(graph)
