"""Phase 1: learn the α of every pair alone, against the unquantized model, then choose.

    min over α of ‖ŷ − y‖²,  ŷ = Q2(W2 A⁻¹) · Qa(Q1(A W1) x + A b1) + b2

x and y come from the unquantized model, ranges from the current batch (Park et al., 2022, §3.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode
from torch import Tensor

from .. import checkpoint
from ..config import STARTS, CalibrationConfig
from ..errors import PairError
from ..pairs.attachment import refuse_attached
from ..pairs.discovery import find_pairs, nothing_found
from ..pairs.pair import Pair, Pairs
from ..progress import progress
from ..sim.checks import check_sim
from ..sim.ranges import placeholders
from ..sim.samples import as_samples
from .blocks import Block, capture, reached, ways
from .choice import Choice, choose, held_back
from .learner import Learner, PairResult


@dataclass(frozen=True)
class Calibration:
    """Result of phase 1: the α of every pair. The sim is as it was; `fold` applies it.

    Attributes:
        results: what was found for each pair, and the α that it got.
        config: the settings.
        seconds: wall time.
        choice: what was compared on the whole model; None where blocks alone decided.
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
        """Kind of pair → geometric mean of the block error kept over that of a start."""
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
            learned = sum(r.kept == "learned" for r in of_kind)
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
    """Learn the α of every pair block by block; the sim itself is not changed.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET sim; its quantizers' bits and granularity are used, not their ranges.
        calib_loader: yields inputs of the model, e.g. token ids (B, T).
        pairs: the pairs to calibrate; all that `find_pairs` finds when not given.
        config: settings; `CalibrationConfig.paper()` for the paper's.
        checkpoint_dir: where each finished pair is written, and read again after an
            interruption when data, weights and settings are the same.

    Returns:
        α, losses and times of every pair. Without `keep_best` α may be worse than its start.

    Raises:
        SimError, DataError, PairError, UnfoldedError: see their messages; the sim is as it was.
    """
    config = config or CalibrationConfig()
    check_sim(sim)
    refuse_attached(sim)
    samples = as_samples(calib_loader, sim.model)
    found = find_pairs(sim, samples=samples) if pairs is None else Pairs(tuple(pairs))
    if not found:
        raise PairError(nothing_found(found))
    chosen = tuple(found)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    begin = time.perf_counter()
    results: list[PairResult] = []
    by_block = config.choice == "block"
    plans = ways(sim, samples)
    fitted, held = (samples, []) if by_block else held_back(samples)
    if not all(reached(pair, plans[: len(fitted)]) for pair in chosen):
        fitted = samples  # some pair lies on the way of the others alone
    groups = capture(sim, chosen, fitted, config.capture_bytes, plans[: len(fitted)])
    blocks = _one_by_one(groups)
    with placeholders(sim.quantizers()), in_eval_mode(sim.model):
        for _, block in zip(progress(len(chosen), "calibrating pairs"), blocks, strict=True):
            results.append(_resume_or_learn(block, config, folder))
    choice = None
    if not by_block:
        results, choice = choose(sim, results, fitted, held, config.choice == "layer")
    return Calibration(tuple(results), config, time.perf_counter() - begin, choice)


def _one_by_one(groups: Iterable[list[Block]]) -> Iterator[Block]:
    for group in groups:
        while group:
            yield group.pop(0)  # what it holds is freed once it is done


def _resume_or_learn(block: Block, config: CalibrationConfig, folder: Path | None) -> PairResult:
    if folder is None:
        return Learner(block, config).learn()
    mark = _fingerprint(block, config)
    name = block.pair.name
    stored = checkpoint.load(folder, name, mark)
    if stored is not None:
        rows, record = stored
        record["curve"] = [(int(s), float(v)) for s, v in record["curve"]]
        device = next(iter(block.runs[0].inputs.values())).device
        found = dict(zip(record.pop("candidates"), rows.to(device), strict=True))
        return PairResult(pair=block.pair, candidates=found, **record)
    result = Learner(block, config).learn()
    record = {k: getattr(result, k) for k in ("kept", "losses", "curve", "seconds", "crossed")}
    record["candidates"] = list(result.candidates)
    checkpoint.save(folder, name, mark, torch.stack([*result.candidates.values()]), record)
    return result


def _fingerprint(block: Block, config: CalibrationConfig) -> str:
    modules = [n.module for n in block.runs[0].nodes if n.module is not None]
    learned_by = {k: v for k, v in config.to_dict().items() if k != "choice"}
    settings = [learned_by, block.pair.name, block.pair.kind, [repr(m) for m in modules]]
    inputs = [t for run in block.runs for t in run.inputs.values()]
    weights = [p for m in modules for p in m.parameters(recurse=False)]
    return checkpoint.fingerprint(settings, [*inputs, *weights])
