"""The error of a block for an α, beside its unquantized outputs.

    ‖ŷ − y‖² / ‖y‖², ŷ and y the block's outputs with and without its quantizers

on tokens that α is trained on, and on tokens that are held back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CalibrationConfig
from ..errors import DataError
from ..pairs.pair import Pair
from ..sim.ranges import weight_quantizers
from ..sim.values import all_finite
from .blocks import Block


class BlockError:
    """The error of one block, as a function of α.

    Each consumer's error is a share of ‖y‖², the mean over all tokens of the run: that takes the
    units out and nothing else. Ranges come from the batch.

    Args:
        block: the block; the rows used of a wide consumer are chosen here.
        config: says how many rows, how many tokens are held back, how many a step takes.

    Attributes:
        targets: y of each consumer for each run, (tokens, channels).

    Raises:
        DataError: the block's unquantized outputs are not finite.
    """

    def __init__(self, block: Block, config: CalibrationConfig) -> None:
        self.block = block
        self.config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        block.rows = {n: self._head_rows(n) for n in block.pair.consumers}
        with torch.no_grad(), block.unquantized():
            self.targets = [[_rows(y) for y in block(run)] for run in block.runs]
        if not all(all_finite(y) for ys in self.targets for y in ys):
            raise DataError(
                f"the unquantized outputs of {block.pair.name} hold NaN or inf. Run the model in "
                "a wider dtype (bf16 or fp32), or check the calibration data."
            )
        self._power = [[_squared(y).mean().clamp(min=1e-12) for y in ys] for ys in self.targets]
        held = [held_tokens(len(ys[0]), config.holdout, self._generator) for ys in self.targets]
        self._held = [h if h.any() else ~h for h in held]
        self._trained = [~h for h in held]

    @property
    def name(self) -> str:
        """The pair's name."""
        return self.block.pair.name

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pair alone."""
        return (self.block.pair,)

    @property
    def device(self) -> torch.device:
        """Where α must lie."""
        return self.targets[0][0].device

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
        some = torch.randperm(weight.shape[0], generator=self._generator)[:wanted]
        return torch.cat([extreme, some.to(extreme.device)]).unique()

    def _of(self, index: int, outputs: list[Tensor], tokens: Tensor) -> Tensor:
        """The error over some tokens of a run, summed over the consumers."""
        total = torch.zeros((), device=outputs[0].device)
        for place, out in enumerate(outputs):
            error = _squared(out.float() - self.targets[index][place][tokens])
            total = total + error.mean() / self._power[index][place]
        return total

    @torch.no_grad()
    def on_held_back(self, alpha: Tensor) -> tuple[float, Tensor]:
        """The error on the held-back tokens, with ranges from all tokens of a run.

        Args:
            alpha: α, shape (channels,).

        Returns:
            the error, and the tokens that set the range of some activation quantizer (none of a
            block that runs on all tokens only).
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
                outputs = self.block(run, alpha, wanted=self._held[index])
                losses.append(float(self._of(index, outputs, self._held[index])))
        extremes = torch.cat(found).unique().cpu() if found else torch.zeros(0, dtype=torch.long)
        return sum(losses) / len(losses), extremes

    def on_trained(self, step: int, alpha: Tensor, extremes: Tensor) -> Tensor:
        """The error on random tokens of one run, differentiable in α.

        Args:
            step: number of the step, from 1; the runs take turns.
            alpha: α, shape (channels,).
            extremes: tokens that run as well, so that the ranges are those of the whole run.
        """
        index = (step - 1) % len(self.block.runs)
        run, trained = self.block.runs[index], self._trained[index].nonzero()[:, 0]
        with self.block.quantized():
            if not self.block.by_row or self.config.tokens is None:
                outputs = [_rows(y)[trained] for y in self.block(run, alpha)]
                return self._of(index, outputs, trained)
            order = torch.randperm(trained.numel(), generator=self._generator)
            chosen = trained[order[: self.config.tokens]]
            outputs = self.block(run, alpha, torch.cat([chosen, extremes]))
            return self._of(index, [_rows(y)[: chosen.numel()] for y in outputs], chosen)


def held_tokens(tokens: int, share: float, generator: torch.Generator) -> Tensor:
    """Which tokens of a run are held back: a random share; (tokens,)."""
    held = torch.zeros(tokens, dtype=torch.bool)
    held[torch.randperm(tokens, generator=generator)[: int(tokens * share)]] = True
    return held


def _squared(y: Tensor) -> Tensor:
    """Squared norm of each row; (tokens,)."""
    return y.float().pow(2).sum(-1)


def _rows(y: Tensor) -> Tensor:
    """(…, channels) → (tokens or pixels, channels)."""
    return y.flatten(0, -2)
