"""What a run did and found, as plain data: what its page is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PairFacts:
    """One pair.

    Attributes:
        name, kind, kept: as in the result of phase 1.
        losses: a start, "learned", "halfway" → error of the block (or layer) with it.
        curve: (step, error) while learning.
        crossed: scales that went through zero.
        alpha: α in the weights now, both phases together; (channels,).
        before, after: minimum and maximum of each channel as the consumer reads it, unquantized,
            without and with α in the weights; (2, channels). None where nothing ran it.
    """

    name: str
    kind: str
    kept: str
    losses: Mapping[str, float]
    curve: Sequence[tuple[int, float]]
    crossed: int
    alpha: Floats
    before: Floats | None
    after: Floats | None


@dataclass(frozen=True)
class StreamFacts:
    """The residual stream of one text.

    Attributes:
        title: which model's.
        places: names of the sums, in order.
        tokens: the text, token by token.
        largest: largest |x| over the channels; (places, tokens).
    """

    title: str
    places: Sequence[str]
    tokens: Sequence[str]
    largest: Floats


@dataclass(frozen=True)
class SiteFacts:
    """What one activation quantizer costs: see `SiteCost`."""

    site: str
    bits: int
    error: float
    cost: float


@dataclass(frozen=True)
class CoverageFacts:
    """Operations, by kind, and those that lack an encoding.

    Attributes:
        kinds: kind of operation → (all, those that lack one).
        missing: (name, kind, why) of each that lacks one.
    """

    kinds: Mapping[str, tuple[int, int]]
    missing: Sequence[tuple[str, str, str]] = ()

    @property
    def operations(self) -> int:
        """How many there are."""
        return sum(count for count, _ in self.kinds.values())


@dataclass(frozen=True)
class RunFacts:
    """All of it.

    Attributes:
        headline: (what, value) lines that say what was run.
        perplexity: row of the table → text → perplexity; the first is the unquantized model's.
        bits: kind of quantizer → bits → how many.
        pairs: in order of execution.
        choice: α of all pairs → error of the whole model; None where blocks alone decided.
        chosen: (group of pairs, what it got), and the error with all of it.
        finetuning: (step, loss) of phase 2, empty without it.
        finetuning_loss: its name.
        streams: the residual stream, before and after what was done to it.
        sites: what each activation quantizer costs.
        coverage: operations with and without an encoding.
        stages: what each stage behind phase 1 printed.
        seconds: stage → wall time.
        settings, versions: key → value.
        objective: "block" or "layer": what the errors of pairs are of.
        measured_on: "channels", "sites" → the text that these were looked at on.
    """

    headline: Sequence[tuple[str, str]]
    perplexity: Mapping[str, Mapping[str, float]]
    bits: Mapping[str, Mapping[str, int]]
    pairs: Sequence[PairFacts]
    choice: Mapping[str, float] | None
    chosen: tuple[Mapping[str, str], float] | None
    finetuning: Sequence[tuple[int, float]]
    finetuning_loss: str
    streams: Sequence[StreamFacts]
    sites: Sequence[SiteFacts]
    coverage: CoverageFacts
    stages: Mapping[str, str]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    objective: str
    measured_on: Mapping[str, str]
