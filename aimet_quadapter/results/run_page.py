"""`report.html` of a run: what it did and found, one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import channel_chart
from .plots import number
from .run_facts import PairFacts, RunFacts, SiteFacts
from .run_figures import curves, errors, perplexities, streams
from .templates import flat, render

WORST = 15
"""Sites that the page lists."""


def write_run_page(facts: RunFacts, output: Path) -> None:
    """Write what a run found as one HTML page.

    The page fetches nothing: its policy forbids a browser to. Without scripts all but the chart
    of channels is there.

    Args:
        facts: what was found.
        output: the page, written anew.

    Raises:
        OSError: it cannot be written.
    """
    page = render(
        "run.html.jinja",
        facts=facts,
        verdict=[_verdict(facts.perplexity, text) for text in _texts(facts.perplexity)],
        table=_table(facts.perplexity),
        perplexities=perplexities(facts),
        streams=streams(facts),
        errors=errors(facts),
        curves=curves(facts),
        error_table=_error_table(facts.pairs),
        pair_list=_pair_list(facts.pairs),
        first_pair=channel_chart.widest(facts.pairs),
        sites=_sites(facts.sites),
        seconds=[(stage, f"{value:.1f}") for stage, value in facts.seconds.items()],
        settings=list(flat(facts.settings)),
        versions=list(flat(facts.versions)),
        bokeh=channel_chart.script(),
        chart=channel_chart.chart(),
        pairs_json=channel_chart.data(facts.pairs),
        chart_id=channel_chart.SOURCE,
        chart_width=channel_chart.WIDTH,
    )
    output.write_text(page, encoding="utf-8")


def _texts(perplexity: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(next(iter(perplexity.values()), {}))


def _verdict(perplexity: Mapping[str, Mapping[str, float]], text: str) -> dict[str, str]:
    """FP → PTQ → Quadapter of a text, and what share of the loss was taken back.

        share = (log PTQ − log Quadapter) / (log PTQ − log FP)

    FP is the unquantized model as it was quantized: behind its prefix, where it has one.
    """
    names = list(perplexity)
    plain = next(name for name in reversed(names) if name.startswith("FP32"))
    chain = [plain, "PTQ", names[-1]]
    values = [perplexity[name][text] for name in chain]
    fp, ptq, ours = (math.log(v) if 0 < v < math.inf else math.inf for v in values)
    if not all(map(math.isfinite, (fp, ptq, ours))):
        said = "a perplexity is not finite"
    elif ptq - fp < 0.01:
        said = "PTQ alone loses less than 1 %: there is nothing to take back"
    else:
        share, left = (ptq - ours) / (ptq - fp), math.exp(ours - fp) - 1
        said = (
            f"{share:.1%} of what PTQ loses is taken back (in log perplexity), {left:+.1%} is left"
        )
        if share < 0:
            said = f"worse than PTQ, {left:+.1%} above the unquantized model"
    shown = " → ".join(f"{name} {number(v)}" for name, v in zip(chain, values, strict=True))
    return {"text": text, "chain": shown, "said": said}


def _table(perplexity: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    texts = _texts(perplexity)
    rows = [(name, [number(row[text]) for text in texts]) for name, row in perplexity.items()]
    return {"heads": texts, "rows": rows}


def _error_table(pairs: Sequence[PairFacts]) -> dict[str, Any]:
    """A row a pair: its error with every α that was to choose from."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair.losses))
    rows = [
        {
            "pair": pair.name,
            "kind": pair.kind,
            "cells": [(f"{pair.losses[n]:.3g}" if n in pair.losses else "–") for n in names],
            "kept": names.index(pair.kept),
            "crossed": pair.crossed,
        }
        for pair in pairs
    ]
    return {"names": names, "rows": rows}


def _pair_list(pairs: Sequence[PairFacts]) -> dict[str, list[tuple[int, str]]]:
    """Kind → place and name of its pairs, as the list shows them."""
    found: dict[str, list[tuple[int, str]]] = {}
    for place, pair in enumerate(pairs):
        found.setdefault(pair.kind, []).append((place, pair.name))
    return found


def _sites(sites: Sequence[SiteFacts]) -> dict[str, Any]:
    """The worst, each with its share of the largest cost and of the sum of all."""
    total = sum(site.cost for site in sites)
    largest = max((site.cost for site in sites), default=0.0)
    rows = [
        {
            "site": site.site,
            "bits": site.bits,
            "error": f"{site.error:.2%}",
            "cost": f"{site.cost:.3g}",
            "width": round(100 * site.cost / largest) if largest else 0,
            "share": f"{site.cost / total:.1%}" if total else "–",
        }
        for site in sorted(sites, key=lambda one: -one.cost)[:WORST]
    ]
    return {"rows": rows, "of": len(sites)}
