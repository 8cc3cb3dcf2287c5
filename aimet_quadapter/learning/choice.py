"""Which α each pair gets, by the error of the whole model: that of its parts is not enough.

The error of a block or a layer does not see what its α does to errors that come from elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from .. import checkpoint
from ..config import STARTS
from ..pairs.folding import fold, weights_restored
from ..progress import progress
from ..sim.identity import identity
from ..sim.inputs import Sample
from ..sim.losses import EndLoss
from ..sim.ranges import restored, weight_quantizers
from ..sim.weights import fine_grids_unsearched, quantized_once
from .blocks import quantizers_inside
from .learner import HALFWAY, PairResult

Ranges = dict[QuantizerBase, list[Tensor]]
"""Quantizer → the ends of its range."""

NAMES = (*STARTS, "learned", HALFWAY)

FEW = 4
"""Samples below which none is held back."""

FILE = "the choice"
"""Name of the checkpoint with the losses of all trials."""

COMPOSED = "composed"
"""First word of the key of a trial whose ranges were put together from others'."""

EIGHTHS = 8
"""Parts that more are divided into; the last is held back."""

QUARTERS = 4
"""Parts that the pairs of a kind are divided into, in order, for a choice by layer."""


@dataclass(frozen=True)
class Choice:
    """What was compared on held-back samples.

    Attributes:
        losses: what all pairs had ("ones", …, "block": what each layer or block keeps) → `EndLoss`.
        kept: "all" → what every pair had in the best of `losses`; then each group that got
            something better (a kind of pair, or a part of its layers) → what it got.
        loss: `EndLoss` with all that was chosen; never above any of `losses`.
        trials: losses that were asked for, those of an interrupted run included.
        seconds: wall time.
    """

    losses: dict[str, float]
    kept: dict[str, str]
    loss: float
    trials: int
    seconds: float

    def __str__(self) -> str:
        all_pairs = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        chosen = ", ".join(f"{group}: {name}" for group, name in self.kept.items())
        return (
            f"error of the model on held-back text, α of all pairs: {all_pairs}\n"
            f"chosen {self.loss:.4g} ({chosen}); {self.trials} trials in {self.seconds:.0f} s"
        )


def held_back(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Samples to learn on, and those to choose on: the last eighth, or all of less than four.

    Of samples of several sizes the last of the largest: the end of a text may be a single token.
    """
    if len(samples) < FEW:
        return samples, samples
    sizes = [next(iter(sample.tensors())).numel() for sample in samples]
    largest = [place for place, size in enumerate(sizes) if size == max(sizes)]
    kept = set(largest[-max(len(samples) // EIGHTHS, 1) :])
    return (
        [sample for place, sample in enumerate(samples) if place not in kept],
        [samples[place] for place in sorted(kept)],
    )


def for_ranges(fitted: Sequence[Sample], held: Sequence[Sample]) -> Sequence[Sample]:
    """Of the samples to learn on, those that set the ranges of a trial: as many, two at least."""
    return fitted[: max(len(held), 2)]


def expected_trials(kinds: Mapping[str, int], names: int, by_layer: bool) -> tuple[int, int]:
    """How many trials `choose` will make, about: what is best so far is not tried again.

    Args:
        kinds: kind of pair → how many there are.
        names: candidates of each pair.
        by_layer: whether it chooses for each part of the layers too.

    Returns:
        Trials with ranges of their own; those with ranges put together.
    """
    by_kind = len(kinds) if len(kinds) > 1 else 0  # a single kind is all pairs
    parts = sum(min(count, QUARTERS) for count in kinds.values()) if by_layer else 0
    groups = by_kind + parts
    return names + 1 + groups // 2, (names - 1) * groups


def choose(
    sim: Any,
    results: Sequence[PairResult],
    fitted: Sequence[Sample],
    held: Sequence[Sample],
    by_layer: bool,
    folder: Path | None = None,
) -> tuple[list[PairResult], Choice]:
    """Give each group of pairs the α with which the whole sim is nearest to its unquantized model.

    First every pair gets the α of one name, or what its layer or block kept; from the best of
    these, one group after the other is given what lowers the loss most. Each trial folds, sets the
    ranges, and runs the held samples. The first trials set the ranges on as many of the fitted
    samples as are held back, two at least. α changes what lies between a producer and its
    consumers alone, so the others put theirs together: there what the trial of the same α had,
    elsewhere what the best of them had. The best for a group is tried with ranges of its own, and
    taken if it is better so.

    Args:
        sim: the sim; it is left as it is.
        results: what each layer or block found.
        fitted: the samples that α was learned on.
        held: samples to compare on.
        by_layer: choose for each part of the layers too.
        folder: where the loss of each trial is written, and read again after an interruption.

    Returns:
        The results with the α that was chosen, and what was compared.
    """
    begin = time.perf_counter()
    search = _Search(sim, results, for_ranges(fitted, held), held, folder)
    kinds = dict.fromkeys(r.pair.kind for r in results)
    groups = {kind: [r.pair.name for r in results if r.pair.kind == kind] for kind in kinds}
    with restored(list(sim.quantizers())), fine_grids_unsearched():
        search.compare_uniform()
        search.improve(groups)
        if by_layer:
            search.improve({n: part for k, names in groups.items() for n, part in _parts(k, names)})
    chosen = [replace(r, kept=search.best[r.pair.name]) for r in results]
    seconds = time.perf_counter() - begin
    return chosen, Choice(search.uniform, search.kept, search.loss, len(search.asked), seconds)


def _parts(kind: str, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    size = -(-len(names) // QUARTERS)
    for place, begin in enumerate(range(0, len(names), size)):
        yield f"{kind} {place + 1}/{QUARTERS}", names[begin : begin + size]


class _Search:
    """Settings that were tried, the best of them, and how it came about."""

    def __init__(
        self,
        sim: Any,
        results: Sequence[PairResult],
        range_samples: Sequence[Sample],
        held: Sequence[Sample],
        folder: Path | None,
    ) -> None:
        self.sim = sim
        self.pairs = [r.pair for r in results]
        self.candidates = {r.pair.name: r.candidates for r in results}
        self.block = {r.pair.name: r.kept for r in results}
        self.names = [n for n in NAMES if all(n in c for c in self.candidates.values())]
        self.range_samples = range_samples
        self.end_loss = EndLoss(sim.model, held)
        self.folder = folder
        self.mark = self._fingerprint(held) if folder else ""
        self.tried = self._stored()
        self.asked: set[tuple[str, ...]] = set()
        self.activations = _activations(sim)
        self.inside = {p.name: quantizers_inside(sim.model, p) for p in self.pairs}
        self.ranges: dict[tuple[str, ...], Ranges] = {}
        self.settings = {n: dict.fromkeys(self.block, n) for n in self.names}
        self.settings["block"] = self.block
        self.best = self.block
        self.loss = math.inf
        self.uniform: dict[str, float] = {}
        self.kept: dict[str, str] = {}

    def compare_uniform(self) -> None:
        """The same for all pairs; go on from the best."""
        for _, (name, setting) in zip(
            progress(len(self.settings), "comparing α of all pairs"),
            self.settings.items(),
            strict=True,
        ):
            self.uniform[name] = self._loss_with(setting)
            if self.uniform[name] < self.loss:
                self.best, self.loss, self.kept = setting, self.uniform[name], {"all": name}

    def improve(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Give one group of pairs after the other what lowers the loss most."""
        for _, (group, names) in zip(
            progress(len(groups), "choosing α"), groups.items(), strict=True
        ):
            settings = {n: self.best | dict.fromkeys(names, n) for n in self.names}
            composed = {n: self._composed_loss_with(setting) for n, setting in settings.items()}
            candidate = min(composed, key=lambda n: composed[n])
            setting, loss = settings[candidate], self._loss_with(settings[candidate])
            if loss < self.loss:
                self.best, self.loss = setting, loss
                self.kept[group] = candidate

    def _loss_with(self, setting: Mapping[str, str]) -> float:
        """With ranges set on the samples."""
        key = tuple(setting.values())
        if self._is_new(key):
            with self._folded(setting):
                self._set_ranges(key)
                self._try(key)
        return self.tried[key]

    def _composed_loss_with(self, setting: Mapping[str, str]) -> float:
        """With ranges of other trials; weights' without AIMET's care for the sums of a linear."""
        if setting in self.settings.values():
            return self._loss_with(setting)
        key = (COMPOSED, *setting.values())
        if self._is_new(key):
            ranges = dict(self._ranges_of(self.kept["all"]))
            for pair, kept in setting.items():
                ranges |= {q: self._ranges_of(kept)[q] for q in self.inside[pair]}
            with self._folded(setting):
                for quantizer, ends in ranges.items():
                    for parameter, end in zip(quantizer.parameters(False), ends, strict=True):
                        parameter.data.copy_(end)
                self.sim.compute_encodings(no_pass)  # weights alone
                self._try(key)
        return self.tried[key]

    def _ranges_of(self, name: str) -> Ranges:
        """Of the activations, with one of `settings`; set anew after an interruption."""
        setting = self.settings[name]
        key = tuple(setting.values())
        if key not in self.ranges:
            with self._folded(setting):
                self._set_ranges(key)
        return self.ranges[key]

    def _set_ranges(self, key: tuple[str, ...]) -> None:
        self.sim.compute_encodings(self._run)
        self.ranges[key] = {
            q: [end.detach().clone() for end in q.parameters(False)] for q in self.activations
        }

    @contextmanager
    def _folded(self, setting: Mapping[str, str]) -> Iterator[None]:
        alphas = {name: self.candidates[name][kept] for name, kept in setting.items()}
        self.end_loss.remember()
        with weights_restored(self.sim, self.pairs):
            fold(self.sim, self.pairs, alphas)
            yield

    def _is_new(self, key: tuple[str, ...]) -> bool:
        self.asked.add(key)
        return key not in self.tried

    def _try(self, key: tuple[str, ...]) -> None:
        self.tried[key] = self.end_loss()
        if self.folder:
            losses = torch.tensor(list(self.tried.values()), dtype=torch.float64)
            checkpoint.save(self.folder, FILE, self.mark, losses, {"tried": list(self.tried)})

    def _stored(self) -> dict[tuple[str, ...], float]:
        """Setting → loss, of a run that was interrupted."""
        stored = checkpoint.load(self.folder, FILE, self.mark) if self.folder else None
        if stored is None:
            return {}
        losses, record = stored
        return dict(zip(map(tuple, record["tried"]), losses.tolist(), strict=True))

    def _fingerprint(self, held: Sequence[Sample]) -> str:
        """Of all that a loss depends on."""
        settings, tensors = identity(self.sim)
        samples = [*self.range_samples, *held]
        tensors += [x for sample in samples for x in sample.tensors()]
        tensors += [a for found in self.candidates.values() for a in found.values()]
        settings += [repr(sample.map(torch.zeros_like)) for sample in samples]
        settings += [[p.name for p in self.pairs], self.block, len(held)]
        return checkpoint.fingerprint(settings, tensors)

    def _run(self, model: nn.Module) -> None:
        with quantized_once(model):
            for sample in self.range_samples:
                sample(model)


def no_pass(model: nn.Module) -> None:
    """For `compute_encodings`: ranges of activations without data stay."""


def _activations(sim: Any) -> list[QuantizerBase]:
    """Every quantizer that is none of a weight."""
    of_weights = {q for m in sim.model.modules() for q in weight_quantizers(m)}
    return [q for q in sim.quantizers() if q not in of_weights]
