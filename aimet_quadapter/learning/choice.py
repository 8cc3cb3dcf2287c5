"""Which α each pair gets, by the error of the whole model: that of its parts is not enough.

The error of a block or a layer does not see what its α does to errors that come from elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn

from .. import checkpoint
from ..config import STARTS
from ..pairs.folding import folds_in_turn
from ..pairs.pair import Pair
from ..progress import progress
from ..sim.identity import identity
from ..sim.inputs import Sample
from ..sim.losses import EndLoss
from ..sim.ranges import restored, weight_quantizers
from ..sim.weights import fine_grids_unsearched, quantized_once
from .blocks import quantizers_inside
from .learner import HALFWAY, PairResult
from .ranks import Ranks

Setting = Mapping[str, str]
"""Name of a pair → which of its α it has."""

Key = tuple[str, ...]
"""Of a trial: the values of its setting, `COMPOSED` before them where its ranges are others'."""

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


def expected_trials(
    kinds: Mapping[str, int], names: int, by_layer: bool, processes: int = 1
) -> tuple[int, int]:
    """How many trials `choose` will make, about: what is best so far is not tried again.

    Args:
        kinds: kind of pair → how many there are.
        names: candidates of each pair.
        by_layer: whether it chooses for each part of the layers too.
        processes: how many make one each at a time; such count as one.

    Returns:
        Trials with ranges of their own; those with ranges put together.
    """
    by_kind = len(kinds) if len(kinds) > 1 else 0  # a single kind is all pairs
    parts = sum(min(count, QUARTERS) for count in kinds.values()) if by_layer else 0
    groups = by_kind + parts
    uniform, of_group = (math.ceil(trials / processes) for trials in (names + 1, names - 1))
    return uniform + groups // 2, of_group * groups


def choose(
    sim: Any,
    results: Sequence[PairResult],
    fitted: Sequence[Sample],
    held: Sequence[Sample],
    by_layer: bool,
    folder: Path | None = None,
    ranks: Ranks | None = None,
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
        ranks: those that make a trial each at a time, all with the same arguments; the first one
            alone reads and writes. None: this process makes all.

    Returns:
        The results with the α that was chosen, and what was compared; on all ranks the same.
    """
    begin = time.perf_counter()
    search = Search(sim, results, for_ranges(fitted, held), held, folder, ranks or Ranks())
    kinds = dict.fromkeys(r.pair.kind for r in results)
    groups = {kind: [r.pair.name for r in results if r.pair.kind == kind] for kind in kinds}
    with search.trying():
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


class Search:
    """Settings that were tried, the best of them, and how it came about."""

    def __init__(
        self,
        sim: Any,
        results: Sequence[PairResult],
        range_samples: Sequence[Sample],
        held: Sequence[Sample],
        folder: Path | None,
        ranks: Ranks,
    ) -> None:
        self.sim = sim
        self.ranks = ranks
        self.pairs = [r.pair for r in results]
        self.candidates = {r.pair.name: r.candidates for r in results}
        self.block = {r.pair.name: r.kept for r in results}
        self.names = [n for n in NAMES if all(n in c for c in self.candidates.values())]
        self.range_samples = range_samples
        self.end_loss = EndLoss(sim.model, held)
        self.folder = folder if ranks.first else None
        with ranks.all_or_none():
            self.mark = self._fingerprint(held) if self.folder else ""
            stored = self._stored()
        self.tried: dict[Key, float] = {tuple(key): loss for key, loss in ranks.told(stored)[0]}
        self.asked: set[Key] = set()
        self.activations = _activations(sim)
        self.inside = {p.name: self._places(p) for p in self.pairs}
        self.ends: dict[Key, list[Tensor]] = {}
        self.ranges_are_set = False
        self.settings: dict[str, Setting] = {n: dict.fromkeys(self.block, n) for n in self.names}
        self.settings["block"] = self.block
        self.best: Setting = self.block
        self.loss = math.inf
        self.uniform: dict[str, float] = {}
        self.kept: dict[str, str] = {}

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Let trials change weights and ranges for a while."""
        with ExitStack() as stack:
            with self.ranks.all_or_none():
                self._ready(stack)
            yield
            with self.ranks.all_or_none():
                stack.close()

    def _ready(self, stack: ExitStack) -> None:
        self.end_loss.remember()
        self.fold_these = stack.enter_context(folds_in_turn(self.sim, self.pairs))
        stack.enter_context(restored(list(self.sim.quantizers())))
        stack.enter_context(fine_grids_unsearched())

    def compare_uniform(self) -> None:
        """The same for all pairs; go on from the best."""
        self._try_all(map(_key, self.settings.values()), "comparing α of all pairs")
        for name, setting in self.settings.items():
            self.uniform[name] = self.tried[_key(setting)]
            if self.uniform[name] < self.loss:
                self.best, self.loss, self.kept = setting, self.uniform[name], {"all": name}

    def improve(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Give one group of pairs after the other what lowers the loss most."""
        for _, (group, names) in zip(
            progress(len(groups), "choosing α"), groups.items(), strict=True
        ):
            settings = {n: {**self.best, **dict.fromkeys(names, n)} for n in self.names}
            composed = {n: self._composed_key(setting) for n, setting in settings.items()}
            self._try_all(composed.values())
            candidate = min(composed, key=lambda n: self.tried[composed[n]])
            setting, own = settings[candidate], _key(settings[candidate])
            self._try_all([own])
            if self.tried[own] < self.loss:
                self.best, self.loss = setting, self.tried[own]
                self.kept[group] = candidate

    def _composed_key(self, setting: Setting) -> Key:
        """Of a trial with ranges of other trials; what all pairs had, had its own."""
        uniform = setting in self.settings.values()
        return _key(setting) if uniform else (COMPOSED, *_key(setting))

    def _try_all(self, keys: Iterable[Key], about: str | None = None) -> None:
        """Have the loss of each; of those that are new every rank tries one at a time."""
        keys = list(dict.fromkeys(keys))
        self.asked.update(keys)
        new = [key for key in keys if key not in self.tried]
        rank, size = self.ranks.rank, self.ranks.size
        turns = [new[begin : begin + size] for begin in range(0, len(new), size)]
        for turn in progress(turns, about) if about else turns:
            with self.ranks.all_or_none():
                own = self.trial(turn[rank]) if rank < len(turn) else {}
            of_all = self.ranks.told_tensors(own)
            for key, found in zip(turn, of_all[: len(turn)], strict=True):
                self.tried[key] = found.pop("loss").item()
                if found:
                    self.ends[key] = [found[str(place)] for place in range(len(found))]
            with self.ranks.all_or_none():
                self._store()

    def trial(self, key: Key) -> dict[str, Tensor]:
        """The loss of a trial, and the ends of all ranges where it set them itself."""
        if key[0] == COMPOSED:
            return {"loss": self._composed_loss(self._setting(key[1:]))}
        self.fold(self._setting(key))
        ends = {str(place): end for place, end in enumerate(self._set_ranges())}
        return {"loss": self._loss(), **ends}

    def _composed_loss(self, setting: Setting) -> Tensor:
        """With ranges of other trials; weights' without AIMET's care for the sums of a linear."""
        ends = list(self._ends_of(self.kept["all"]))
        for pair, kept in setting.items():
            others = self._ends_of(kept)
            for place in self.inside[pair]:
                ends[place] = others[place]
        self.fold(setting)
        if not self.ranges_are_set:
            self._set_ranges()  # for AIMET a range counts once it was computed
        for parameter, end in zip(self._parameters(), ends, strict=True):
            parameter.data.copy_(end)
        self.sim.compute_encodings(no_pass)  # weights alone
        return self._loss()

    def _loss(self) -> Tensor:
        return torch.tensor(self.end_loss(), dtype=torch.float64)

    def _ends_of(self, name: str) -> list[Tensor]:
        """Of what all pairs had; set anew after an interruption."""
        key = _key(self.settings[name])
        if key not in self.ends:
            self.fold(self.settings[name])
            self.ends[key] = self._set_ranges()
        return self.ends[key]

    def _set_ranges(self) -> list[Tensor]:
        self.sim.compute_encodings(self._run)
        self.ranges_are_set = True
        return [end.detach().cpu().clone() for end in self._parameters()]

    def _parameters(self) -> list[nn.Parameter]:
        """The ends of the ranges of all activations."""
        return [end for q in self.activations for end in q.parameters(False)]

    def _places(self, pair: Pair) -> list[int]:
        """Those inside a pair, among all of them."""
        inside = set(quantizers_inside(self.sim.model, pair))
        owners = [q for q in self.activations for _ in q.parameters(False)]
        return [place for place, q in enumerate(owners) if q in inside]

    def _setting(self, kept: Sequence[str]) -> Setting:
        return dict(zip(self.block, kept, strict=True))

    def fold(self, setting: Setting) -> None:
        """In place of the last trial's α."""
        self.fold_these({name: self.candidates[name][kept] for name, kept in setting.items()})

    def _store(self) -> None:
        if self.folder:
            losses = torch.tensor(list(self.tried.values()), dtype=torch.float64)
            checkpoint.save(self.folder, FILE, self.mark, losses, {"tried": list(self.tried)})

    def _stored(self) -> list[tuple[Key, float]]:
        """What a run that was interrupted had tried."""
        stored = checkpoint.load(self.folder, FILE, self.mark) if self.folder else None
        if stored is None:
            return []
        losses, record = stored
        return list(zip(record["tried"], losses.tolist(), strict=True))

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


def _key(setting: Setting) -> Key:
    return tuple(setting.values())


def no_pass(model: nn.Module) -> None:
    """For `compute_encodings`: ranges of activations without data stay."""


def _activations(sim: Any) -> list[QuantizerBase]:
    """Every quantizer that is none of a weight."""
    of_weights = {q for m in sim.model.modules() for q in weight_quantizers(m)}
    return [q for q in sim.quantizers() if q not in of_weights]
