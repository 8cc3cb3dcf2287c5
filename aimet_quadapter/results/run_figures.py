"""What a run did and found → its figures, each drawn only if there is something to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .figures import Drawing, Panel
from .plots import Series, bars, heat, lines
from .run_facts import PairFacts, RunFacts, StreamFacts

SMALLEST = 1e-9
"""What an error of 0 is drawn at: the axis is logarithmic."""

TEXTS_AT_ONCE = 2
"""Texts whose perplexities stand in one plot."""


def perplexities(facts: RunFacts) -> Drawing:
    """Bars, a plot for every two texts."""
    rows = list(facts.perplexity)
    texts = list(next(iter(facts.perplexity.values()), {}))
    panels = []
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[begin : begin + TEXTS_AT_ONCE]
        groups = {text: [facts.perplexity[row][text] for row in rows] for text in some}
        if all(math.isfinite(value) for values in groups.values() for value in values):
            panels.append(Panel(bars(" and ".join(some), rows, groups, "perplexity")))
    caption = "Lower is better. Bars begin at 1; where the axis is logarithmic, mind it."
    return Drawing("Perplexity", caption, panels)


def errors(facts: RunFacts) -> Drawing:
    """For each kind of pair, the error of every α that was to choose from, and of the one kept."""
    panels = [
        Panel(lines(kind, _marks(of_kind), "pair, in order", "error / that of ones", joined=False))
        for kind, of_kind in _by_kind(facts.pairs).items()
    ]
    whose = "layer's outputs" if facts.objective == "layer" else "block's outputs"
    caption = (
        f"‖ŷ − y‖² / ‖y‖² of each {whose} on held-back tokens, over that with α of ones: a mark a "
        "pair, a plot a kind. A ring is around the α that the pair got. It need not be the "
        "lowest: the error of the whole model decides last."
    )
    return Drawing("Error of each start, and of what was kept", caption, panels)


def _by_kind(pairs: Sequence[PairFacts]) -> dict[str, list[PairFacts]]:
    found: dict[str, list[PairFacts]] = {}
    for pair in pairs:
        found.setdefault(pair.kind, []).append(pair)
    return found


def _share(pair: PairFacts, name: str) -> float:
    return max(pair.losses[name], SMALLEST) / max(pair.losses["ones"], SMALLEST)


def _marks(pairs: Sequence[PairFacts]) -> list[Series]:
    names = list(dict.fromkeys(name for pair in pairs for name in pair.losses))
    found = []
    for style, name in enumerate(names):
        there = [(i, _share(p, name)) for i, p in enumerate(pairs) if name in p.losses]
        found.append(Series(name, style, [x for x, _ in there], [y for _, y in there]))
    places = list(range(len(pairs)))
    kept = [_share(pair, pair.kept) for pair in pairs]
    return [*found, Series("kept", 0, places, kept, ring=True)]


def curves(facts: RunFacts) -> Drawing:
    """Phase 1, a line a kind of pair; phase 2."""
    panels = []
    if series := _learning(facts.pairs):
        panels.append(Panel(lines("Phase 1", series, "step", "error / error at step 0")))
    if facts.finetuning:
        steps, losses = zip(*facts.finetuning, strict=True)
        line = Series(facts.finetuning_loss, len(series), steps, losses)
        panels.append(Panel(lines("Phase 2", [line], "step", facts.finetuning_loss)))
    caption = (
        "Phase 1: held-back error of the pairs of a kind over what each began with, geometric "
        "mean. Step 0 is the best start; a line that stays at 1 or above learned nothing that "
        "its formula did not know, and the start is then kept."
    )
    return Drawing("Loss", caption, panels)


def _learning(pairs: Sequence[PairFacts]) -> list[Series]:
    found = []
    for style, (kind, of_kind) in enumerate(_by_kind(pairs).items()):
        learning = [p.curve for p in of_kind if len(p.curve) > 1 and p.curve[0][1] > 0]
        steps = [step for step, _ in learning[0]] if learning else []
        means = [
            math.exp(fmean(math.log(max(c[k][1], SMALLEST) / c[0][1]) for c in learning))
            for k in range(len(steps))
        ]
        if steps:
            found.append(Series(kind, style, steps, means))
    return found


def streams(facts: RunFacts) -> Drawing:
    """Layer by token, with and without prefix and rotation on one scale of colours."""
    values = [v for one in facts.streams for v in one.largest.flatten().tolist() if v > 0]
    drawn = [one for one in facts.streams if one.largest.size] if values else []
    limits = (min(values), max(values)) if values else (1.0, 1.0)
    panels = [
        Panel(
            heat(
                one.title,
                one.largest.clip(min=limits[0]),
                "token",
                "sum, from the first layer up",
                "largest |x| of the token",
                limits,
            )
        )
        for one in drawn
    ]
    notes = [f"{one.title}: largest {one.largest.max():.4g}, {_where(one)}" for one in drawn]
    caption = (
        "Largest value of each token of the first calibration sample in the sums that are the "
        "residual stream, unquantized. A bright column is a sink: a token whose few huge values "
        "set the range that all others share. " + "; ".join(notes) + "."
    )
    return Drawing("Residual stream by layer and token", caption, panels)


def _where(one: StreamFacts) -> str:
    place, token = divmod(int(one.largest.argmax()), one.largest.shape[1])
    return f"at token {token} ({one.tokens[token]!r}) of {one.places[place]}"
