"""Pieces of a run, each done once for real on a sample or a window, and timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .loading import Subject, simulate, transforms_of
from .settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

PAGE_SECONDS = 1.0
"""What drawing and writing `report.html` takes."""

CLIPPED, LIMITS = 8, 5
"""Sites that `choose_ranges` looks at, at most; limits that it tries at each, about."""

FIRST_ROUND, LATER_ROUNDS = 24, 8
"""Sites that `assign_bits` tries for its first choice, and for each one behind it."""


@dataclass(frozen=True)
class Passes:
    """Seconds of what a sim does again and again.

    Attributes:
        build: making the sim.
        ranges: setting ranges, besides the passes.
        sample: a pass of a sample, every weight quantized anew.
        weights: quantizing the weights that are kept for several passes.
        window: a pass of an evaluation window, with these.
    """

    build: float
    ranges: float
    sample: float
    weights: float
    window: float

    @property
    def kept(self) -> float:
        """A pass of a sample with the weights that are kept."""
        return max(self.sample - self.weights, self.sample / 4)

    def set_ranges(self, samples: int) -> float:
        """`set_ranges` on samples."""
        return self.ranges + self.weights + samples * self.kept


def window_of(subject: Subject) -> tuple[Tensor, float]:
    """An evaluation window of the first text, and how many there are in all texts."""
    tokens = subject.window - len(subject.begins_with)
    windows = sum(max(len(ids) / tokens, 1.0) for ids in subject.texts.values())
    return next(iter(subject.texts.values()))[:tokens], windows


def scoring(model: Any, subject: Subject) -> float:
    """Seconds of the perplexity of a window."""
    from ..evaluation.scores import perplexity
    from ..learning.cost import seconds_of

    ids, _ = window_of(subject)
    begin = subject.begins_with
    return seconds_of(lambda: perplexity(model, ids, subject.window, prefix=begin, progress=False))


def transforming(settings: Settings, subject: Subject) -> tuple[float, float]:
    """Seconds of choosing a prefix, and of turning the stream; 0 where that is not asked for."""
    from ..transforms.prefix_choice import seconds_to_choose
    from ..transforms.rotation import seconds_to_rotate

    model, choosing = subject.model, 0.0
    wanted, kind = transforms_of(settings, model)
    if wanted == "auto":
        choosing = seconds_to_choose(model, subject.tokenizer, subject.samples)
    return choosing, seconds_to_rotate(model) if kind != "none" else 0.0


def passing(settings: Settings, subject: Subject) -> tuple[Any, Passes]:
    """The sim with ranges from one sample, and the seconds of its passes."""
    from ..learning.cost import seconds_of
    from ..sim.weights import fine_grids_unsearched, quantized_once

    begin = time.perf_counter()
    sim = simulate(settings, subject.model)
    build = time.perf_counter() - begin
    of_sample = spent = 0.0

    def run(model: Any) -> None:
        nonlocal of_sample, spent
        begin = time.perf_counter()
        of_sample = seconds_of(lambda: model(subject.samples[0]))
        spent = time.perf_counter() - begin

    begin = time.perf_counter()
    with fine_grids_unsearched():
        sim.compute_encodings(run)
    ranges = time.perf_counter() - begin - spent

    def weights() -> None:
        with quantized_once(sim.model):
            pass

    kept = seconds_of(weights)
    window = max(scoring(sim, subject) - kept, 0.0)
    return sim, Passes(build, ranges, of_sample, kept, window)


def choosing_rotation(passes: Passes, window: float, samples: list[Any]) -> float:
    """Seconds of `choose_rotation`, about: two sims.

    Args:
        passes: of a sim.
        window: seconds of a pass of the unquantized model.
        samples: all samples.
    """
    from ..learning.choice import for_ranges, held_back
    from ..sim.inputs import Sample

    fitted, held = held_back([Sample.of(sample) for sample in samples])
    compared = passes.weights + len(held) * (passes.kept + window)
    return 2 * (passes.build + passes.set_ranges(len(for_ranges(fitted, held))) + compared)


def compensating(sim: Any, samples: list[Any], fixed: float) -> float:
    """Seconds of `compensate_softmax`: done on two samples, and scaled.

    Args:
        sim: the sim, which is changed.
        samples: all samples.
        fixed: seconds of finding pairs, which do not depend on how many there are.
    """
    from ..precision import compensate_softmax

    begin = time.perf_counter()
    compensate_softmax(sim, samples[:2])
    seconds = time.perf_counter() - begin
    return seconds + (len(samples) - 2) * max(seconds - fixed, 0.0) / 2


def finetuning(sim: Any, batches: list[Any], pairs: Any, config: Any) -> float:
    """Seconds of phase 2: one step of it, again where that is quick; the sim is changed."""
    from ..learning.cost import QUICK
    from ..learning.finetuning import finetune
    from ..pairs.discovery import find_pairs
    from ..pairs.folding import fold

    begin = time.perf_counter()
    again = find_pairs(sim, kinds={pair.kind for pair in pairs})  # as the run does
    finding = time.perf_counter() - begin

    def run(steps: int) -> float:
        short = replace(config, steps=steps, accumulate=1)
        seconds = finetune(sim, batches[:1], again, config=short).seconds
        fold(sim)
        return seconds

    of_one = run(1)
    steps = config.steps * config.accumulate
    if of_one > QUICK:
        return finding + of_one * steps
    step = max(run(5) - of_one, 0.0) / 4
    return finding + of_one + (steps - 1) * step


def reporting(passes: Passes, window: float, samples: int) -> float:
    """Seconds of `report.html`, about.

    Args:
        passes: of the sim.
        window: seconds of a pass of the unquantized model.
        samples: that ranges of channels are taken from, before and after.
    """
    return PAGE_SECONDS + 2 * window + samples * (window + passes.sample) + 3 * passes.sample


def clipping(passes: Passes, samples: int) -> float:
    """Seconds of `choose_ranges`, about: how many ranges are stretched is not known before."""
    return passes.weights + (2 + CLIPPED * LIMITS) * samples * passes.kept


def widening(passes: Passes, samples: int, budget: int) -> float:
    """Seconds of `assign_bits` at most: it ends when another site gains too little."""
    trials = FIRST_ROUND + (budget - 1) * LATER_ROUNDS
    return passes.weights + (2 + trials) * samples * passes.kept
