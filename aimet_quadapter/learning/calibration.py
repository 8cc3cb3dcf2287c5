"""Phase 1: learn α layer by layer or block by block, against the unquantized model, then choose.

    min over α of ‖ŷ − y‖²,  ŷ = Q2(W2 A⁻¹) · Qa(Q1(A W1) x + A b1) + b2

is a block's, of one pair (Park et al., 2022, §3.2). A layer's ŷ is its output, with the α of all
pairs inside. x and y come from the unquantized model (a layer's x from the quantized one, if asked
for), ranges from the current batch.

Where `torch.distributed` is initialised each rank learns some of the pairs and makes some of the
choice's trials, and all have the result of one process, to the bit on the same hardware with as
many threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from .. import checkpoint
from ..config import STARTS, CalibrationConfig
from ..errors import PairError
from ..pairs.attachment import refuse_attached
from ..pairs.discovery import find_pairs, nothing_found
from ..pairs.pair import Pair, Pairs
from ..progress import progress
from ..sim.checks import check_sim
from ..sim.identity import identity
from ..sim.inputs import Sample
from ..sim.ranges import placeholders
from ..sim.samples import as_samples
from ..sim.trace import Trace
from ..sim.weights import frozen
from .analytic import Evidence, evidence
from .block_error import BlockError
from .blocks import Block, capture, check_ways, reached, ways
from .choice import Choice, choose, held_back
from .layer_error import LayerError
from .layers import Layer, Passed, capture_layers, layers_of, passed_on, take_up
from .learner import HALFWAY, Learner, Objective, PairResult
from .packing import of_all_ranks, packed, unpacked
from .ranks import joined
from .sharing import shared_out

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """Result of phase 1: the α of every pair. The sim is as it was; `fold` applies it.

    Attributes:
        results: what was found for each pair, and the α that it got.
        config: the settings.
        seconds: wall time.
        choice: what was compared on the whole model; None where layers and blocks alone decided.
    """

    results: tuple[PairResult, ...]
    config: CalibrationConfig
    seconds: float = 0.0
    choice: Choice | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(r.pair for r in self.results)

    @property
    def alphas(self) -> dict[str, Tensor]:
        """Pair name → α."""
        return {r.pair.name: r.alpha for r in self.results}

    def error_ratio(self, start: str = "ones") -> dict[str, float]:
        """Kind of pair → geometric mean of the error kept over that of a start."""
        ratios: dict[str, list[float]] = {}
        for r in self.results:
            if r.losses.get(start, 0) > 0 and r.loss > 0:
                ratios.setdefault(r.pair.kind, []).append(math.log(r.loss / r.losses[start]))
        return {k: math.exp(sum(v) / len(v)) for k, v in ratios.items()}

    def __str__(self) -> str:
        starts = [s for s in STARTS if any(s in r.losses for r in self.results)]
        head = f"{'kind':<20}{'pairs':>6}{'learned':>9}"
        lines = [head + "".join(f"{'error/' + s:>19}" for s in starts)]
        tables = {s: self.error_ratio(s) for s in starts}
        for kind in dict.fromkeys(r.pair.kind for r in self.results):
            of_kind = [r for r in self.results if r.pair.kind == kind]
            learned = sum(r.kept not in STARTS for r in of_kind)
            row = f"{kind:<20}{len(of_kind):>6}{learned:>9}"
            lines.append(row + "".join(f"{tables[s].get(kind, math.nan):>19.3f}" for s in starts))
        if self.choice is not None:
            lines.append(str(self.choice))
        lines.append(f"{len(self.results)} pairs in {self.seconds:.0f} s")
        return "\n".join(lines)


def calibrate(
    sim: Any,
    calib_loader: Iterable[Any],
    pairs: Iterable[Pair] | None = None,
    config: CalibrationConfig | None = None,
    checkpoint_dir: str | Path | None = None,
) -> Calibration:
    """Learn the α of every pair, those of a layer together; the sim itself is not changed.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Where `torch.distributed` is initialised all ranks have to call it, with the same sim, samples,
    pairs and settings: each learns a run of the pairs (`sharing`), they share the trials of the
    choice, and all return the same.

    Args:
        sim: an AIMET sim; its quantizers' bits and granularity are used, not their ranges.
        calib_loader: yields inputs of the model, e.g. token ids (B, T).
        pairs: the pairs to calibrate; all that `find_pairs` finds when not given.
        config: settings; `CalibrationConfig.paper()` for the paper's.
        checkpoint_dir: where each finished layer or block, and each trial of the choice, is
            written, and read again after an interruption when data, weights and settings are the
            same. Ranks may share it, or have one each.

    Returns:
        α, losses and times of every pair. Without `keep_best` α may be worse than its start.

    Raises:
        SimError, DataError, PairError, UnfoldedError: see their messages; the sim is as it was.
            Of several ranks each raises what one of them did.
    """
    config = config or CalibrationConfig()
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    begin = time.perf_counter()
    with joined() as ranks:
        with ranks.all_or_none():
            task = _task(sim, calib_loader, pairs, config)
            facts = _facts(sim, task, config) if ranks.size > 1 else {}
        ranks.check_same(facts)
        with ranks.all_or_none():
            own = shared_out(sim.model, task.pairs, config, ranks.size)[ranks.rank]
            results = _own_results(sim, own, task, config, folder)
        results = of_all_ranks(ranks, results, task.pairs, next(sim.model.parameters()).device)
        choice = None
        if config.choice != "block":
            by_layer = config.choice == "layer"
            results, choice = choose(sim, results, task.fitted, task.held, by_layer, folder, ranks)
    return Calibration(tuple(results), config, time.perf_counter() - begin, choice)


@dataclass(frozen=True)
class _Task:
    """What is learned, and on what.

    Attributes:
        pairs: the pairs.
        fitted: samples to learn on.
        plans: their ways through the model.
        held: samples to choose on.
    """

    pairs: tuple[Pair, ...]
    fitted: Sequence[Sample]
    plans: Sequence[Trace]
    held: Sequence[Sample]


def _task(
    sim: Any, calib_loader: Iterable[Any], pairs: Iterable[Pair] | None, config: CalibrationConfig
) -> _Task:
    check_sim(sim)
    refuse_attached(sim)
    samples = as_samples(calib_loader, sim.model)
    found = find_pairs(sim, samples=samples) if pairs is None else Pairs(tuple(pairs))
    if not found:
        raise PairError(nothing_found(found))
    chosen = tuple(dict.fromkeys(found))
    plans = ways(sim, samples)
    fitted, held = (samples, []) if config.choice == "block" else held_back(samples)
    check_ways(chosen, plans)
    own = {id(sample): plan for sample, plan in zip(samples, plans, strict=True)}
    fitted_plans = [own[id(sample)] for sample in fitted]
    if not all(reached(pair, fitted_plans) for pair in chosen):
        fitted, fitted_plans = samples, plans  # some pair lies on the way of the others alone
    return _Task(chosen, fitted, fitted_plans, held)


def _facts(sim: Any, task: _Task, config: CalibrationConfig) -> dict[str, Any]:
    """What ranks must have in common, by what a user calls it."""
    settings, tensors = identity(sim)
    samples = [*task.fitted, *task.held]
    inputs = [x for sample in samples for x in sample.tensors()]
    shapes = [repr(sample.map(lambda x: x.new_zeros(x.shape, device="cpu"))) for sample in samples]
    return config.to_dict() | {
        "the model and its quantizers": checkpoint.fingerprint(settings, tensors),
        "the calibration samples": checkpoint.fingerprint(shapes, inputs),
        "the pairs": checkpoint.fingerprint([[p.name, p.kind] for p in task.pairs], []),
    }


def _own_results(
    sim: Any, own: Sequence[Pair], task: _Task, config: CalibrationConfig, folder: Path | None
) -> list[PairResult]:
    """What is found for the pairs of a rank; it may have none."""
    if not own:
        return []
    units = _units(sim, own, task.fitted, task.plans, config)
    with placeholders(sim.quantizers()), in_eval_mode(sim.model), frozen(sim.model):
        learned = _learned(sim.model, units, evidence(sim.model, own, task.fitted), config, folder)
        return [r for _, r in zip(progress(len(own), "calibrating pairs"), learned, strict=True)]


def _units(
    sim: Any,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    plans: Sequence[Trace],
    config: CalibrationConfig,
) -> Iterator[Layer | Block]:
    """What learns at a time: each layer with the pairs inside it, then the other pairs' blocks."""
    alone = {pair.name: pair for pair in pairs}
    layers = layers_of(sim.model, pairs) if config.objective == "layer" else {}
    budget = config.capture_bytes
    for layer in _one_by_one(capture_layers(sim, layers, samples, budget, plans)):
        for pair in layer.pairs:
            del alone[pair.name]
        yield layer
    rest = tuple(alone.values())
    yield from _one_by_one(capture(sim, rest, samples, budget, plans))


def _one_by_one(groups: Iterable[list[T]]) -> Iterator[T]:
    for group in groups:
        while group:
            yield group.pop(0)  # what it holds is freed once it is done


def _learned(
    model: nn.Module,
    units: Iterable[Layer | Block],
    found: Mapping[str, Evidence],
    config: CalibrationConfig,
    folder: Path | None,
) -> Iterator[PairResult]:
    """Learn, or read what an earlier run learned from just the same."""
    passed: list[Passed] = []
    for unit in units:
        if passed and isinstance(unit, Layer):
            take_up(unit, passed)
        mark = _fingerprint(unit, config) if folder else ""
        results = _stored(folder, unit, mark) if folder else None
        if results is None:
            error: Objective = (
                LayerError(unit, config) if isinstance(unit, Layer) else BlockError(unit, config)
            )
            results = Learner(error, model, found, config).learn()
            if folder:
                _store(folder, unit, mark, results)
        if config.inputs == "quantized" and isinstance(unit, Layer):
            passed = passed_on(unit, {r.pair.name: r.alpha for r in results})
        yield from results


def _store(folder: Path, unit: Layer | Block, mark: str, results: Sequence[PairResult]) -> None:
    checkpoint.save(folder, _file(unit), mark, *packed(results))


def _stored(folder: Path, unit: Layer | Block, mark: str) -> list[PairResult] | None:
    stored = checkpoint.load(folder, _file(unit), mark)
    if stored is None:
        return None
    rows, record = stored
    return unpacked(unit.pairs, rows.to(unit.inputs[0].device), record)


def _file(unit: Layer | Block) -> str:
    return "; ".join(pair.name for pair in unit.pairs)


def _fingerprint(unit: Layer | Block, config: CalibrationConfig) -> str:
    learned_by = {k: v for k, v in config.to_dict().items() if k != "choice"}
    pairs = [[p.name, p.kind] for p in unit.pairs]
    settings = [learned_by, unit.name, pairs, [repr(m) for m in unit.modules], HALFWAY]
    held = [x for m in unit.modules for x in (*m.parameters(recurse=False), *m.buffers(False))]
    return checkpoint.fingerprint(settings, [*unit.inputs, *held])
