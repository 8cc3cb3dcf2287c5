"""What tells two sims apart: everything but the ends of ranges that are set anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aimet_torch.quantization.encoding_analyzer import PercentileEncodingAnalyzer
from tiny import batches, decoder_sim, llama

from aimet_quadapter import set_ranges
from aimet_quadapter.checkpoint import fingerprint
from aimet_quadapter.sim.identity import identity


def mark(sim: Any) -> str:
    return fingerprint(*identity(sim))


def head(sim: Any) -> Any:
    return sim.model.lm_head.output_quantizers[0]


def share(sim: Any) -> None:
    sim.model.model.norm.output_quantizers[0] = head(sim)


def change_a_weight(sim: Any) -> None:
    with torch.no_grad():
        sim.model.lm_head.weight[0, 0] += 1


def find_ranges_otherwise(sim: Any) -> None:
    head(sim).encoding_analyzer = PercentileEncodingAnalyzer((), percentile=99)


CHANGES = (
    lambda sim: setattr(head(sim), "bitwidth", 16),
    lambda sim: head(sim).allow_overwrite(min=False),
    share,
    change_a_weight,
    find_ranges_otherwise,
)


def test_ranges_that_are_set_anew_do_not_count() -> None:
    sim = decoder_sim(llama())
    set_ranges(sim, batches())
    before = mark(sim)
    set_ranges(sim, batches(seed=7))
    assert mark(sim) == before


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_result_counts(change: Callable[[Any], None]) -> None:
    sim = decoder_sim(llama())
    set_ranges(sim, batches())
    before = mark(sim)
    change(sim)
    assert mark(sim) != before


def test_another_percentile_counts() -> None:
    sim = decoder_sim(llama())
    find_ranges_otherwise(sim)
    before = mark(sim)
    head(sim).encoding_analyzer.set_percentile(98)
    assert mark(sim) != before


def test_a_fixed_end_counts() -> None:
    sim = decoder_sim(llama())
    set_ranges(sim, batches())
    head(sim).allow_overwrite(min=False)
    before = mark(sim)
    with torch.no_grad():
        head(sim).max += 1
    assert mark(sim) == before
    with torch.no_grad():
        head(sim).min -= 1
    assert mark(sim) != before
