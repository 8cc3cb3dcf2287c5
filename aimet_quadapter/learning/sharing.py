"""Which rank learns what: runs of blocks that cost about the same.

A run, because a rank goes through the unquantized model as far as its last block and no further,
and because neighbours are of every kind: what one costs more than estimated, every run costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from ..config import CalibrationConfig
from ..pairs.pair import Pair
from .blocks import in_groups
from .layers import layers_of

T = TypeVar("T")


def shared_out(
    model: nn.Module, pairs: Sequence[Pair], config: CalibrationConfig, size: int
) -> list[tuple[Pair, ...]]:
    """The pairs of each rank.

    A rank learns whole blocks or whole layers. Layers that read what the quantized ones before them
    give are a single piece: one rank learns them all.

    Args:
        model: a sim's model.
        pairs: all of them, in order of execution.
        config: settings of phase 1.
        size: number of ranks.
    """
    layers = list(layers_of(model, pairs).values()) if config.objective == "layer" else []
    inside = {pair.name for of in layers for pair in of}
    if config.inputs == "quantized" and layers:
        layers = [tuple(pair for of in layers for pair in of)]
    pieces = layers + [(pair,) for pair in pairs if pair.name not in inside]
    costs = [sum(_cost(model, pair, config) for pair in piece) for piece in pieces]
    return [tuple(p for piece in run for p in piece) for run in runs(pieces, costs, size)]


def runs(items: Sequence[T], costs: Sequence[int], size: int) -> list[list[T]]:
    """Items as so many runs, one behind the other, the dearest of which is as cheap as can be.

    Args:
        items: in order.
        costs: of each.
        size: number of runs; the last ones may be empty.
    """
    limits = range(max(costs), sum(costs) + 1)

    def enough(limit: int) -> bool:
        return len(list(in_groups(items, costs, limit))) <= size

    found = list(in_groups(items, costs, limits[bisect_left(limits, True, key=enough)]))
    return found + [[] for _ in range(size - len(found))]


def _cost(model: nn.Module, pair: Pair, config: CalibrationConfig) -> int:
    """Weights that a token is multiplied with: of a wide consumer the rows that a step takes."""
    parameters = dict.fromkeys((scale.module, scale.parameter) for scale in pair.scales)
    total = 0
    for module, name in parameters:
        weight = getattr(model.get_submodule(module), name)
        total += min(len(weight), config.head_rows or len(weight)) * weight[0].numel()
    return total
