"""What is looked at inside a sim besides its perplexity: errors of blocks, ranges of channels."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from torch import Tensor

from aimet_quadapter import fold
from aimet_quadapter.learning.blocks import Block, Run, capture
from aimet_quadapter.pairs.channels import channel_ends as ends_of

from .methods import Subject

BLOCK_BYTES = 2**29
"""Block inputs held at a time."""


@torch.no_grad()
def block_errors(before: QuantizationSimModel, subject: Subject) -> dict[str, dict[str, Any]]:
    """Error of every block as the methods left it.

        mean over the consumers of ‖ŷ − y‖² / ‖y‖²

    Both are given what the block reads in the unquantized model on the calibration samples:
    ŷ comes from the block with its weights and ranges of now, y from the unquantized block
    before any weight was rounded or trained, with the α folded that the methods folded.

    Args:
        before: a sim as the methods found it; the α are folded into it.
        subject: as the methods left it.
    """
    folded = [pair for pair in subject.pairs if pair.name in subject.alphas]
    fold(before, folded, subject.alphas)
    samples = [(sample,) for sample in subject.samples]
    sims = (before, subject.sim)
    groups = (capture(sim, subject.pairs, samples, BLOCK_BYTES) for sim in sims)
    found = {}
    for old, new in chain.from_iterable(map(zip, *groups)):
        errors = [error for run in range(len(old.runs)) for error in _errors(old, new, run)]
        found[new.pair.name] = {"kind": new.pair.kind, "error": mean(errors)}
    return found


def _errors(old: Block, new: Block, number: int) -> list[float]:
    """‖ŷ − y‖² / ‖y‖² of each consumer, in one run of a block."""
    inputs = old.runs[number].inputs
    with old.unquantized():
        targets = old(old.runs[number])
    with new.as_it_is():
        outputs = new(Run(new.runs[number].nodes, inputs))
    squared = ((o - y).pow(2).sum() / y.pow(2).sum() for o, y in zip(outputs, targets, strict=True))
    return [float(one) for one in squared]


Ends = dict[str, dict[str, list[float]]]
"""Pair → "min" and "max" → a value for each channel."""


def channel_ends(subject: Subject, producers: Sequence[str]) -> Ends:
    """Minimum and maximum of each channel that a pair's first consumer reads, unquantized.

    Args:
        subject: run on its samples.
        producers: patterns; pairs whose producer has such a name.
    """
    wanted = [
        p for p in subject.pairs if any(fnmatch.fnmatchcase(p.producer, x) for x in producers)
    ]
    found = ends_of(subject.sim.model, wanted, subject.samples)
    return {
        name: {"min": low.tolist(), "max": high.tolist()} for name, (low, high) in found.items()
    }


def channel_change(before: Ends, after: Ends, alphas: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the methods made of the channels, for pairs that have an α."""
    return {
        name: {
            "alpha": alphas[name].tolist(),
            "before": before[name],
            "after": now,
            "range_before": [min(before[name]["min"]), max(before[name]["max"])],
            "range_after": [min(now["min"]), max(now["max"])],
        }
        for name, now in after.items()
        if name in alphas
    }
