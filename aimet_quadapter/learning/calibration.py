"""Phase 1: learn the α of every pair alone, against the unquantized model.

    min over α of ‖ŷ − y‖²,  ŷ = Q2(W2 A⁻¹) · Qa(Q1(A W1) x + A b1) + b2

x and y come from the unquantized model, ranges from the current batch (Park et al., 2022, §3.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..config import STARTS, CalibrationConfig
from ..errors import DataError, PairError
from ..pairs.attachment import refuse_attached
from ..pairs.discovery import find_pairs
from ..pairs.pair import Pair
from ..progress import progress
from ..sim.checks import check_sim
from ..sim.ranges import placeholders, weight_quantizers
from ..sim.samples import as_samples
from .analytic import cle, smoothquant
from .blocks import Block, Run, capture

SMALLEST_ALPHA = 1e-4
"""What a plain α that came too near to zero is lifted to."""


@dataclass(frozen=True)
class PairResult:
    """What calibration found for one pair.

    Attributes:
        pair: the pair.
        alpha: the α kept, shape (channels,).
        kept: where it comes from: "learned", or the start that training did not improve on.
        losses: name of a start, or "learned" → its block error on held-back tokens.
        curve: (step, block error on held-back tokens).
        seconds: wall time.
        crossed: scales that a plain α took through zero; their absolute values are kept.
    """

    pair: Pair
    alpha: Tensor
    kept: str
    losses: dict[str, float]
    curve: list[tuple[int, float]]
    seconds: float
    crossed: int = 0

    @property
    def loss(self) -> float:
        """Block error of the α kept."""
        return self.losses[self.kept]


@dataclass(frozen=True)
class Calibration:
    """Result of phase 1: the α of every pair. The sim is as it was; `fold` applies it."""

    results: tuple[PairResult, ...]
    config: CalibrationConfig
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

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
    chosen = tuple(find_pairs(sim, samples[0]) if pairs is None else pairs)
    if not chosen:
        raise PairError(
            "there is no pair to calibrate. print(find_pairs(sim)) shows every candidate and why "
            "it was refused."
        )
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    begin = time.perf_counter()
    results: list[PairResult] = []
    blocks = _one_by_one(capture(sim, chosen, samples, config.capture_bytes))
    with placeholders(sim.quantizers()):
        for _, block in zip(progress(len(chosen), "calibrating pairs"), blocks, strict=True):
            results.append(_resume_or_learn(block, config, folder))
    return Calibration(tuple(results), config, time.perf_counter() - begin)


def _one_by_one(groups: Iterable[list[Block]]) -> Iterator[Block]:
    for group in groups:
        while group:
            yield group.pop(0)  # what it holds is freed once it is done


def _resume_or_learn(block: Block, config: CalibrationConfig, folder: Path | None) -> PairResult:
    if folder is None:
        return _Learner(block, config).learn()
    mark = _fingerprint(block, config)
    name = block.pair.name
    stored = checkpoint.load(folder, name, mark)
    if stored is not None:
        alpha, record = stored
        record["curve"] = [(int(s), float(v)) for s, v in record["curve"]]
        device = next(iter(block.runs[0].inputs.values())).device
        return PairResult(pair=block.pair, alpha=alpha.to(device), **record)
    result = _Learner(block, config).learn()
    record = {k: getattr(result, k) for k in ("kept", "losses", "curve", "seconds", "crossed")}
    checkpoint.save(folder, name, mark, result.alpha, record)
    return result


def _fingerprint(block: Block, config: CalibrationConfig) -> str:
    modules = [n.module for n in block.runs[0].nodes if n.module is not None]
    settings = [config.to_dict(), block.pair.name, block.pair.kind, [repr(m) for m in modules]]
    inputs = [t for run in block.runs for t in run.inputs.values()]
    weights = [p for m in modules for p in m.parameters(recurse=False)]
    return checkpoint.fingerprint(settings, [*inputs, *weights])


class _Learner:
    """Learns the α of one block."""

    def __init__(self, block: Block, config: CalibrationConfig) -> None:
        self.block = block
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        block.rows = {n: self._head_rows(n) for n in block.pair.consumers}
        with torch.no_grad(), block.unquantized():
            self.targets = [[_rows(y) for y in block(run)] for run in block.runs]
        if not all(bool(y.isfinite().all()) for ys in self.targets for y in ys):
            raise DataError(
                f"the unquantized outputs of {block.pair.name} hold NaN or inf. Run the model in "
                "a wider dtype (bf16 or fp32), or check the calibration data."
            )
        self.power = [[_squared(y).mean().clamp(min=1e-12) for y in ys] for ys in self.targets]
        held = [self._held_back(ys[0].shape[0]) for ys in self.targets]
        self.held = [h if h.any() else ~h for h in held]
        self.train = [~h for h in held]
        self.extremes = torch.zeros(0, dtype=torch.long)

    def _head_rows(self, name: str) -> Tensor | None:
        """Output rows of a wide linear to use: random ones and all that can set a range."""
        module = self.block.model.get_submodule(name)
        wanted = self.config.head_rows
        whole_rows = not any(getattr(q, "block_size", None) for q in weight_quantizers(module))
        if not isinstance(module, torch.nn.Linear) or wanted is None or not whole_rows:
            return None
        weight: Tensor = module.weight.detach()
        if weight.shape[0] <= 2 * wanted:
            return None
        # For any α the largest |w/α| of the matrix lies in a row that is extreme in some column.
        extreme = torch.cat([weight.argmax(0), weight.argmin(0)])
        some = torch.randperm(weight.shape[0], generator=self.generator)[:wanted]
        return torch.cat([extreme, some.to(extreme.device)]).unique()

    def _held_back(self, tokens: int) -> Tensor:
        held = torch.zeros(tokens, dtype=torch.bool)
        count = int(tokens * self.config.holdout)
        held[torch.randperm(tokens, generator=self.generator)[:count]] = True
        return held

    def _loss(self, index: int, outputs: list[Tensor], tokens: Tensor) -> Tensor:
        """‖ŷ − y‖² / ‖y‖² over some tokens of a run, summed over the consumers.

        ‖y‖² is the mean over all tokens of the run: it takes the units out and nothing else.
        """
        total = torch.zeros((), device=outputs[0].device)
        for place, out in enumerate(outputs):
            error = _squared(out.float() - self.targets[index][place][tokens])
            total = total + error.mean() / self.power[index][place]
        return total

    @torch.no_grad()
    def evaluate(self, alpha: Tensor) -> tuple[float, Tensor]:
        """Block error on the held-back tokens, ranges from all tokens of a run.

        Returns:
            the error, and the tokens that set the range of some activation quantizer.
        """
        found: list[Tensor] = []

        def observe(x: Tensor) -> None:
            if self.block.by_row and self.config.extremes:
                flat = x.reshape(x.shape[0], -1)
                count = min(self.config.extremes, x.shape[0])
                found.append(flat.amax(1).topk(count).indices)
                found.append(flat.amin(1).neg().topk(count).indices)

        losses = []
        with self.block.quantized(observe):
            for index, run in enumerate(self.block.runs):
                outputs = [_rows(y)[self.held[index]] for y in self.block(run, alpha)]
                losses.append(float(self._loss(index, outputs, self.held[index])))
        extremes = torch.cat(found).unique().cpu() if found else self.extremes
        return sum(losses) / len(losses), extremes

    def _starts(self) -> dict[str, Tensor]:
        ones = torch.ones(self.block.pair.channels, device=self.targets[0][0].device)
        starts = {"ones": ones}
        if self.config.keep_best or self.config.start in ("cle", "best"):
            starts["cle"] = cle(self.block).to(ones)
        if self.config.keep_best or self.config.start in ("smoothquant", "best"):
            starts["smoothquant"] = smoothquant(self.block).to(ones)
        return starts

    def learn(self) -> PairResult:
        """Train α; keep the best seen, or the last without `keep_best`."""
        begin = time.perf_counter()
        starts = self._starts()
        seen = {name: self.evaluate(alpha) for name, alpha in starts.items()}
        losses = {name: loss for name, (loss, _) in seen.items()}
        best = min(losses, key=lambda n: losses[n])
        start = best if self.config.start == "best" else self.config.start
        best_alpha, best_loss = starts[best], losses[best]
        curve = [(0, losses[start])]
        self.extremes = seen[start][1]
        for step, alpha in self._train(starts[start]):
            loss, self.extremes = self.evaluate(alpha)
            if not math.isfinite(loss):
                raise DataError(
                    f"the block error of {self.block.pair.name} became {loss} at step {step}. "
                    "Lower lr, or use parametrization='exp'."
                )
            curve.append((step, loss))
            if loss < best_loss or not self.config.keep_best:
                best, best_alpha, best_loss = "learned", alpha, loss
        crossed = int((best_alpha <= 0).sum())
        if crossed:
            best_alpha = best_alpha.abs().clamp(min=SMALLEST_ALPHA)
            best_loss, _ = self.evaluate(best_alpha)
        learned = min((loss for _, loss in curve[1:]), default=losses[start])
        losses["learned"] = best_loss if best == "learned" else learned
        return PairResult(
            pair=self.block.pair,
            alpha=best_alpha,
            kept=best,
            losses=losses,
            curve=curve,
            seconds=time.perf_counter() - begin,
            crossed=crossed,
        )

    def _train(self, start: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Adam on α or log α; yields (step, α) whenever it is time to compare."""
        config = self.config
        exp = config.parametrization == "exp"
        parameter = (start.log() if exp else start.clone()).requires_grad_()
        optimizer = torch.optim.Adam([parameter], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_every, config.decay)
        for step in range(1, config.steps + 1):
            index = (step - 1) % len(self.block.runs)
            with self.block.quantized():
                loss = self._step_loss(index, parameter.exp() if exp else parameter)
            (parameter.grad,) = torch.autograd.grad(loss, [parameter])
            optimizer.step()
            schedule.step()
            if step % config.evaluate_every == 0 or step == config.steps:
                alpha = parameter.detach().clone()
                yield step, alpha.exp() if exp else alpha

    def _step_loss(self, index: int, alpha: Tensor) -> Tensor:
        run: Run = self.block.runs[index]
        train = self.train[index].nonzero()[:, 0]
        if not self.block.by_row or self.config.tokens is None:
            outputs = [_rows(y)[train] for y in self.block(run, alpha)]
            return self._loss(index, outputs, train)
        order = torch.randperm(train.numel(), generator=self.generator)[: self.config.tokens]
        chosen = train[order]
        outputs = self.block(run, alpha, torch.cat([chosen, self.extremes]))
        return self._loss(index, [_rows(y)[: chosen.numel()] for y in outputs], chosen)


def _squared(y: Tensor) -> Tensor:
    """Squared norm of each row; (tokens,)."""
    return y.float().pow(2).sum(-1)


def _rows(y: Tensor) -> Tensor:
    """(…, channels) or an image (B, channels, H, W) → (tokens or pixels, channels)."""
    return (y.movedim(1, -1) if y.dim() == 4 else y).flatten(0, -2)
