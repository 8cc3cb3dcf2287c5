"""The α of a block or a layer: Adam from one of its starts, and the best seen on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import CalibrationConfig
from ..errors import DataError
from ..pairs.pair import Pair
from .analytic import Evidence, cle, neutral, smoothquant

HALFWAY = "halfway"
"""Name of √α of the learned α: half the way from ones, in log α."""

SMALLEST_ALPHA = 1e-4
"""What a plain α that came too near to zero is lifted to."""


@dataclass(frozen=True)
class PairResult:
    """What calibration found for one pair.

    Attributes:
        pair: the pair.
        kept: where its α comes from: "learned", "halfway" (its square root), or a start (`STARTS`).
        losses: each of these → the error on held-back tokens, of the pair's block or of the layer
            whose pairs learned together.
        curve: (step, that error).
        seconds: wall time; a layer's is divided among its pairs.
        crossed: scales of the learned α that went through zero; their absolute values are taken.
        candidates: each of these → its α, shape (channels,).
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
        """Error with the α kept; a layer's, with what all of its pairs have of that name."""
        return self.losses[self.kept]


class Objective(Protocol):
    """What is lowered: a function of the α of some pairs, one behind the other, (channels,)."""

    @property
    def name(self) -> str: ...
    @property
    def pairs(self) -> tuple[Pair, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def on_held_back(self, alpha: Tensor, /) -> tuple[float, Tensor]: ...
    def on_trained(self, step: int, alpha: Tensor, extremes: Tensor, /) -> Tensor: ...


class Learner:
    """Learns the α of a block or a layer.

    Args:
        error: the error.
        model: the sim's model.
        evidence: pair name → what is known of its channels.
        config: settings of phase 1.
    """

    def __init__(
        self,
        error: Objective,
        model: nn.Module,
        evidence: Mapping[str, Evidence],
        config: CalibrationConfig,
    ) -> None:
        self.error = error
        self.model = model
        self.config = config
        self.evidence = evidence
        self.extremes = torch.zeros(0, dtype=torch.long)  # tokens that set a range at the last α

    def learn(self) -> list[PairResult]:
        """Train α; keep the best seen, or the last without `keep_best`. A result for each pair.

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
        unit = 1.0 if self.config.parametrization == "plain" else losses[start]
        for step, alpha in self._train(starts[start], unit or 1.0):
            loss, self.extremes = self.error.on_held_back(alpha)
            if not math.isfinite(loss):
                raise DataError(
                    f"the error of {self.error.name} became {loss} at step {step}. "
                    "Lower lr, or use parametrization='exp'."
                )
            curve.append((step, loss))
            if len(curve) == 2 or loss < losses["learned"] or not self.config.keep_best:
                learned, losses["learned"] = alpha, loss
        crossed = learned <= 0
        if crossed.any():
            learned = learned.abs().clamp(min=SMALLEST_ALPHA)
            losses["learned"], _ = self.error.on_held_back(learned)
        found = starts | {"learned": learned}
        kept = "learned"
        if self.config.keep_best:
            found[HALFWAY] = learned.sqrt()
            losses[HALFWAY], _ = self.error.on_held_back(found[HALFWAY])
            kept = min(losses, key=lambda n: losses[n])
        candidates = {name: self._split(alpha) for name, alpha in found.items()}
        seconds = (time.perf_counter() - begin) / len(self.error.pairs)
        return [
            PairResult(
                pair=pair,
                kept=kept,
                losses=losses,
                curve=curve,
                seconds=seconds,
                crossed=int(through.sum()),
                candidates={name: parts[place] for name, parts in candidates.items()},
            )
            for place, (pair, through) in enumerate(
                zip(self.error.pairs, self._split(crossed), strict=True)
            )
        ]

    def _split(self, alpha: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each pair."""
        return alpha.split([pair.channels for pair in self.error.pairs])

    def _starts(self) -> dict[str, Tensor]:
        """Name of a start → α; those alone that training starts from or that are compared."""
        pairs, wanted = self.error.pairs, self.config.start
        parts = {"ones": [torch.ones(p.channels) for p in pairs]}
        for name, formula in (("cle", cle), ("smoothquant", smoothquant)):
            if self.config.keep_best or wanted in (name, "best"):
                parts[name] = [formula(self.model, p, self.evidence[p.name]) for p in pairs]
        device = self.error.device
        return {n: torch.cat([a.to(device).float() for a in of]) for n, of in parts.items()}

    def _train(self, start: Tensor, unit: float) -> Iterator[tuple[int, Tensor]]:
        """Adam on α or log α; yields (step, α) whenever it is time to compare.

        The error is divided by `unit`, with log α that at the start: else Adam's ε of 1e-8 damps a
        small one, and the gradient of one vanishes in half precision.
        """
        config = self.config
        exp = config.parametrization == "exp"
        parameter = (start.log() if exp else start.clone()).requires_grad_()
        optimizer = torch.optim.Adam([parameter], lr=config.lr)
        every = config.decay_every or max(config.steps // 4, 1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, every, config.decay)
        for step in range(1, config.steps + 1):
            alpha = parameter.exp() if exp else parameter
            loss = self.error.on_trained(step, alpha, self.extremes)
            (parameter.grad,) = torch.autograd.grad(loss / unit, [parameter])
            optimizer.step()
            schedule.step()
            if step % config.evaluate_every == 0 or step == config.steps:
                alpha = parameter.detach().exp() if exp else parameter.detach().clone()
                parts = zip(self.error.pairs, self._split(alpha), strict=True)
                yield step, torch.cat([neutral(a, self.evidence[p.name]) for p, a in parts])
