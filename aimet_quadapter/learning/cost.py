"""What phase 1 will take, from one real step on a block or layer of each kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode

from .. import checkpoint
from ..config import STARTS, CalibrationConfig
from ..pairs.pair import Pair
from ..sim.inputs import Sample
from ..sim.ranges import placeholders
from ..sim.trace import Trace
from ..sim.weights import frozen
from .analytic import Evidence, evidence
from .block_error import BlockError
from .blocks import Block, block_sizes, capture, in_groups, reached, ways
from .choice import COMPOSED, FILE, Search, expected_trials, for_ranges, held_back
from .layer_error import LayerError
from .layers import Layer, capture_layers, layers_of
from .learner import Learner, PairResult
from .ranks import Ranks

QUICK = 0.2
"""Seconds below which something is measured again: the first time is not the last."""


@dataclass(frozen=True)
class Unit:
    """A block or a layer that was measured.

    Attributes:
        pairs: names of the pairs of each that is like it.
        seconds: that one of them will take.
        extra: bytes that it needs besides what was recorded of it.
        held: bytes that are recorded of it.
        layer: whether it is a layer.
    """

    pairs: tuple[tuple[str, ...], ...]
    seconds: float
    extra: int
    held: int
    layer: bool


@dataclass(frozen=True)
class Phase1Cost:
    """What phase 1 will take.

    Attributes:
        units: what was measured.
        capture: seconds of recording the inputs of all blocks and layers.
        trials: losses that the choice will ask for, about.
        choosing: seconds of all of them, and of what is done once for them.
        record: seconds of recording a sample's pass through the whole model.
        extra: bytes on top of what the sim has: the recorded inputs and what a block needs.
        processes: how many share it.
    """

    units: tuple[Unit, ...]
    capture: float
    trials: int
    choosing: float
    record: float
    extra: int
    processes: int = 1

    @property
    def seconds(self) -> float:
        """All of it."""
        learning = sum(unit.seconds * len(unit.pairs) for unit in self.units) / self.processes
        return self.capture + learning + self.choosing

    def stored(self, folder: Path) -> tuple[int, int, float]:
        """What a folder of checkpoints holds that goes by these names, and what that would spare.

        Whether it fits data, weights and settings is only seen when it is read.

        Returns:
            Blocks or layers, trials of the choice, seconds.
        """
        found, spared = 0, 0.0
        for unit in self.units:
            here = [p for p in unit.pairs if checkpoint.path_of(folder, "; ".join(p)).exists()]
            found += len(here)
            spared += len(here) * unit.seconds / self.processes
        choice = checkpoint.load_all(folder, FILE) if self.trials else None
        tried = min(len(choice[2]["tried"]), self.trials) if choice else 0
        return found, tried, spared + tried / max(self.trials, 1) * self.choosing


def phase_1_cost(
    sim: Any,
    samples: Sequence[Sample],
    pairs: Sequence[Pair],
    config: CalibrationConfig,
    processes: int = 1,
) -> Phase1Cost:
    """Take one real step on a block or layer of each kind, and two trials of the choice.

    A block's comparisons run on all tokens, a step on `tokens` of them: a comparison is measured on
    one sample, or on as many as fill a step, and scaled.

    Args:
        sim: the sim, its ranges set; it is left as it is.
        samples: all that will be calibrated on.
        pairs: the pairs.
        config: settings of phase 1.
        processes: how many share it.
    """
    fitted, held = (samples, []) if config.choice == "block" else held_back(samples)
    few = _few(fitted, config)
    begin = time.perf_counter()
    plans = ways(sim, few)
    record = (time.perf_counter() - begin) / len(few)
    if not all(reached(pair, plans) for pair in pairs):
        few = fitted = samples  # one sample does not run every expert
        plans = ways(sim, few)
    scale = len(fitted) / len(few)
    with placeholders(sim.quantizers()), in_eval_mode(sim.model), frozen(sim.model):
        begin = time.perf_counter()
        found = evidence(sim.model, pairs, few)
        passing = (time.perf_counter() - begin) / len(few)
        units = [
            _measured(sim, unit, alike, found, config, scale)
            for unit, alike in _one_of_each(sim, pairs, few, plans, config)
        ]
    groups = _groups(pairs, plans, units, config, scale)
    trials, choosing = 0, 0.0
    if config.choice != "block":
        kinds: dict[str, int] = {}
        for pair in pairs:
            kinds[pair.kind] = kinds.get(pair.kind, 0) + 1
        expected = kinds, _names(config), config.choice == "layer"
        trials = sum(expected_trials(*expected))
        turns = expected_trials(*expected, processes)
        *of_each, choosing = _trials(sim, pairs, fitted, held)
        choosing += sum(n * seconds for n, seconds in zip(turns, of_each, strict=True))
    group = max((bytes_ for _, bytes_ in groups), default=0)
    return Phase1Cost(
        units=tuple(units),
        capture=len(samples) * record
        + len(fitted) * passing
        + sum(share for share, _ in groups) * len(fitted) * record,
        trials=trials,
        choosing=choosing,
        record=record,
        extra=group + max((unit.extra for unit in units), default=0),
        processes=processes,
    )


def _few(samples: Sequence[Sample], config: CalibrationConfig) -> Sequence[Sample]:
    """One sample, or as many as fill a step."""
    tokens, wanted = 0.0, config.tokens or 1
    for count, sample in enumerate(samples, 1):
        tokens += next(iter(sample.tensors())).numel() * (1 - config.holdout)
        if tokens >= wanted:
            return samples[:count]
    return samples


def _one_of_each(
    sim: Any,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    plans: Sequence[Trace],
    config: CalibrationConfig,
) -> Iterable[tuple[Layer | Block, list[tuple[str, ...]]]]:
    """A layer, then a block of each kind of pairs that lie in none; and what each stands for."""
    layers = layers_of(sim.model, pairs) if config.objective == "layer" else {}
    inside = {pair.name for of in layers.values() for pair in of}
    if layers:
        name = list(layers)[len(layers) // 2]
        alike = [tuple(pair.name for pair in of) for of in layers.values()]
        one = {name: layers[name]}
        for group in capture_layers(sim, one, samples, config.capture_bytes, plans):
            yield group.pop(), alike
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.name not in inside:
            kinds.setdefault(pair.kind, []).append(pair)
    for alone in kinds.values():
        middle = alone[len(alone) // 2]
        for blocks in capture(sim, [middle], samples, config.capture_bytes, plans):
            yield blocks.pop(), [(pair.name,) for pair in alone]


def _measured(
    sim: Any,
    unit: Layer | Block,
    alike: list[tuple[str, ...]],
    found: Mapping[str, Evidence],
    config: CalibrationConfig,
    scale: float,
) -> Unit:
    begin = time.perf_counter()
    layer = isinstance(unit, Layer)
    error: Any = LayerError(unit, config) if isinstance(unit, Layer) else BlockError(unit, config)
    setting_up = time.perf_counter() - begin
    begin = time.perf_counter()
    Learner(error, sim.model, found, config)._starts()
    starting = time.perf_counter() - begin
    pairs = error.pairs
    alpha = torch.cat([torch.ones(pair.channels) for pair in pairs]).to(error.device)
    _, extremes = error.on_held_back(alpha)
    comparing = seconds_of(lambda: error.on_held_back(alpha))
    parameter = alpha.log().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=config.lr)

    def step() -> None:
        loss = error.on_trained(1, parameter.exp(), extremes)
        (parameter.grad,) = torch.autograd.grad(loss, [parameter])
        optimizer.step()

    stepping = seconds_of(step)
    all_tokens = isinstance(unit, Block) and unit.by_row and config.tokens is None
    comparisons = _compared(config) + (2 if layer and config.inputs == "quantized" else 0)
    held = sum(x.nbytes for x in unit.inputs)
    targets = sum(y.nbytes for ys in error.targets for y in ([ys] if layer else ys))
    return Unit(
        pairs=tuple(alike),
        seconds=setting_up * scale
        + starting
        + comparisons * comparing * scale
        + config.steps * stepping * (scale if all_tokens else 1),
        extra=round(targets * scale),
        held=round(held * scale),
        layer=layer,
    )


def _compared(config: CalibrationConfig) -> int:
    """How often a block's α are compared: its starts, now and then, and halfway."""
    starts = len(STARTS) if config.keep_best or config.start == "best" else 1
    return starts + -(-config.steps // config.evaluate_every) + config.keep_best


def _names(config: CalibrationConfig) -> int:
    """Candidates that each block has: its starts, the learned α and, of the best, halfway."""
    return len(STARTS) + 2 if config.keep_best else 2


def _groups(
    pairs: Sequence[Pair],
    plans: Sequence[Trace],
    units: Sequence[Unit],
    config: CalibrationConfig,
    scale: float,
) -> list[tuple[float, int]]:
    """For each group that is recorded at a time: share of a pass that it takes, and its bytes."""
    layers = [unit for unit in units if unit.layer]
    inside = {name for unit in layers for of in unit.pairs for name in of}
    groups: list[tuple[float, int]] = []
    for unit in layers:
        sizes = [unit.held] * len(unit.pairs)
        together = list(in_groups(sizes, sizes, config.capture_bytes))
        groups += [(1 / len(together), sum(group)) for group in together]
    alone = [pair for pair in pairs if pair.name not in inside]
    sizes = [round(size * scale) for size in block_sizes(alone, plans)]
    length = len(plans[0].nodes)
    last = {n.name: n.index + 1 for n in plans[0].nodes}
    both = list(zip(alone, sizes, strict=True))
    done = 0
    for group in in_groups(both, sizes, config.capture_bytes):
        stop = max(last.get(name, length) for pair, _ in group for name in pair.consumers)
        groups.append((max(stop - done, 0) / length, sum(size for _, size in group)))
        done = max(stop, done)  # blocks go on where the last group stopped
    return groups


def _trials(
    sim: Any, pairs: Sequence[Pair], fitted: Sequence[Sample], held: Sequence[Sample]
) -> tuple[float, float, float]:
    """Seconds of a trial with ranges of its own, of one without, and of what is done once."""
    ones = {pair.name: torch.ones(pair.channels) for pair in pairs}
    results = [
        PairResult(pair, "ones", {"ones": 0.0}, [], 0.0, 0, {"ones": ones[pair.name]})
        for pair in pairs
    ]
    search = Search(sim, results, for_ranges(fitted, held), held, None, Ranks())
    begin = time.perf_counter()
    with search.trying():
        once_for_all = time.perf_counter() - begin
        own = once(search.compare_uniform)
        composed = once(lambda: search.trial((COMPOSED, *("ones" for _ in pairs))))
        folding = once(lambda: search.fold_these({n: x.clone() for n, x in ones.items()}))
        end = time.perf_counter()
    once_for_all += time.perf_counter() - end
    # A group's α enter some of the weights: half of them, about.
    return own, composed + folding / 2, once_for_all


def once(work: Callable[[], Any]) -> float:
    """Wall time of something that is called once."""
    begin = time.perf_counter()
    result = work()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    del result
    return time.perf_counter() - begin


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of something; of what is quick the mean of a few, without the first.

    Args:
        work: what it is; it is called once or more.
    """
    times: list[float] = []
    while True:
        times.append(once(work))
        if sum(times) >= QUICK or len(times) == 8:
            later = times[1:] or times
            return sum(later) / len(later)
