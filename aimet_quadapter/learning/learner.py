"""The α of one block: Adam from one of its starts, and the best that was seen on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..errors import DataError
from ..pairs.pair import Pair
from .analytic import cle, evidence, neutral, smoothquant
from .block_error import BlockError
from .blocks import Block

SMALLEST_ALPHA = 1e-4
"""What a plain α that came too near to zero is lifted to."""


@dataclass(frozen=True)
class PairResult:
    """What calibration found for one pair.

    Attributes:
        pair: the pair.
        kept: where its α comes from: "learned", or a start (`STARTS`).
        losses: name of a start, or "learned" → its block error on held-back tokens.
        curve: (step, block error on held-back tokens).
        seconds: wall time.
        crossed: scales of the learned α that went through zero; their absolute values are taken.
        candidates: name of a start, or "learned" → its α, shape (channels,).
    """

    pair: Pair
    kept: str
    losses: dict[str, float]
    curve: list[tuple[int, float]]
    seconds: float
    crossed: int
    candidates: dict[str, Tensor]

    @property
    def alpha(self) -> Tensor:
        """The α kept, shape (channels,)."""
        return self.candidates[self.kept]

    @property
    def loss(self) -> float:
        """Block error of the α kept."""
        return self.losses[self.kept]


class Learner:
    """Learns the α of one block.

    Args:
        block: the block.
        config: settings of phase 1.

    Raises:
        DataError: as in `BlockError`.
    """

    def __init__(self, block: Block, config: CalibrationConfig) -> None:
        self.block = block
        self.config = config
        self.error = BlockError(block, config)
        self.evidence = evidence(block)
        self.extremes = torch.zeros(0, dtype=torch.long)  # tokens that set a range at the last α

    def learn(self) -> PairResult:
        """Train α; keep the best seen, or the last without `keep_best`.

        Raises:
            DataError: the error became NaN or inf.
        """
        begin = time.perf_counter()
        starts = self._starts()
        seen = {name: self.error.on_held_back(alpha) for name, alpha in starts.items()}
        losses = {name: loss for name, (loss, _) in seen.items()}
        best = min(losses, key=lambda n: losses[n])
        start = best if self.config.start == "best" else self.config.start
        learned, losses["learned"] = starts[start], losses[start]
        curve = [(0, losses[start])]
        self.extremes = seen[start][1]
        for step, alpha in self._train(starts[start]):
            loss, self.extremes = self.error.on_held_back(alpha)
            if not math.isfinite(loss):
                raise DataError(
                    f"the block error of {self.block.pair.name} became {loss} at step {step}. "
                    "Lower lr, or use parametrization='exp'."
                )
            curve.append((step, loss))
            if len(curve) == 2 or loss < losses["learned"] or not self.config.keep_best:
                learned, losses["learned"] = alpha, loss
        crossed = int((learned <= 0).sum())
        if crossed:
            learned = learned.abs().clamp(min=SMALLEST_ALPHA)
            losses["learned"], _ = self.error.on_held_back(learned)
        better = losses["learned"] < losses[best] or not self.config.keep_best
        kept = "learned" if better and len(curve) > 1 else best
        return PairResult(
            pair=self.block.pair,
            kept=kept,
            losses=losses,
            curve=curve,
            seconds=time.perf_counter() - begin,
            crossed=crossed,
            candidates=starts | {"learned": learned},
        )

    def _starts(self) -> dict[str, Tensor]:
        ones = torch.ones(self.block.pair.channels, device=self.error.device)
        starts = {"ones": ones}
        if self.config.keep_best or self.config.start in ("cle", "best"):
            starts["cle"] = cle(self.block).to(ones)
        if self.config.keep_best or self.config.start in ("smoothquant", "best"):
            starts["smoothquant"] = smoothquant(self.block).to(ones)
        return starts

    def _train(self, start: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Adam on α or log α; yields (step, α) whenever it is time to compare."""
        config = self.config
        exp = config.parametrization == "exp"
        parameter = (start.log() if exp else start.clone()).requires_grad_()
        optimizer = torch.optim.Adam([parameter], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_every, config.decay)
        for step in range(1, config.steps + 1):
            alpha = parameter.exp() if exp else parameter
            loss = self.error.on_trained(step, alpha, self.extremes)
            (parameter.grad,) = torch.autograd.grad(loss, [parameter])
            optimizer.step()
            schedule.step()
            if step % config.evaluate_every == 0 or step == config.steps:
                alpha = parameter.detach().clone()
                yield step, neutral(alpha.exp() if exp else alpha, *self.evidence)
