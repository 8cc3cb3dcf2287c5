"""The rows of an experiment → its figures, each drawn only if the results hold what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import mean, stdev
from typing import Any

from .files import Group, Row
from .plots import Series, bars, channel_ranges, lines

LINES_AT_ONCE = 8
"""Lines in one plot; more would not be told apart."""


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        svg: the plot.
        summary: one line that stands for it while it is folded.
    """

    svg: str
    summary: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure as it stands on the page.

    Attributes:
        title: its heading.
        caption: what to look for.
        panels: its plots, side by side.
        folded: every plot is opened by its summary; the last one is open.
    """

    title: str
    caption: str
    panels: list[Panel]
    folded: bool = False


def drawings(group: Group, styles: Mapping[str, int]) -> list[Drawing]:
    """Every figure that a group's results allow; `styles` gives each row name its look."""
    found = [_bars(group), _sweep(group, styles), _blocks(group, styles), *_channels(group)]
    found += [_perplexity_curves(group, styles), _loss_curves(group, styles)]
    return [one for one in found if one.panels]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for one value."""
    return stdev(values) if len(values) > 1 else 0.0


def parts(texts: Iterable[str], in_distribution: Sequence[str]) -> dict[str, list[str]]:
    """F-ID and F-OOD → the texts; all of them under one name where nothing is F-ID."""
    texts = list(texts)
    if not in_distribution:
        return {"all texts": texts} if texts else {}
    split = {
        "F-ID": [text for text in texts if text in in_distribution],
        "F-OOD": [text for text in texts if text not in in_distribution],
    }
    return {name: chosen for name, chosen in split.items() if chosen}


def _tuned_on(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """What rows were fine-tuned on, each once; nothing when none was."""
    found = dict.fromkeys(row.in_distribution for row in rows)
    return [texts for texts in found if texts] or [()]


def _common_texts(rows: Sequence[Row]) -> list[str]:
    """Texts that every row has, for means over other texts cannot be compared."""
    every = [row.texts() for row in rows]
    return reduce(lambda a, b: [text for text in a if text in b], every) if every else []


def _bars(group: Group) -> Drawing:
    panels = []
    measured = [row for row in group.rows if row.texts() and row.key.x is None]
    for tuned in _tuned_on(measured):
        rows = [row for row in measured if row.in_distribution in ((), tuned)]
        groups = {
            f"{name} ({', '.join(texts)})": [mean(row.perplexity(*texts)) for row in rows]
            for name, texts in parts(_common_texts(rows), tuned).items()
        }
        if groups and len(rows) > 1:
            title = f"Fine-tuned on {' + '.join(tuned)}" if tuned else "Mean over all texts"
            panels.append(Panel(bars(title, [r.name for r in rows], groups, "perplexity")))
    caption = (
        "As the paper's Figure 1. A method that overfits has a short F-ID bar and a long F-OOD "
        "bar; a good one keeps both near FP32. Several texts are averaged, then the seeds; rows "
        "without fine-tuning stand in every plot. A logarithmic axis begins at perplexity 1."
    )
    return Drawing("In and out of the fine-tuning text", caption, panels)


def _sweep(group: Group, styles: Mapping[str, int]) -> Drawing:
    panels = []
    swept = [row for row in group.rows if row.key.x and row.texts()]
    still = [row for row in group.rows if not row.key.x and row.texts() and not row.in_distribution]
    for axis in dict.fromkeys(row.key.x.name for row in swept if row.key.x):
        for tuned in _tuned_on(swept):
            rows = [
                row
                for row in swept
                if row.key.x and row.key.x.name == axis and row.in_distribution == tuned
            ]
            for name, texts in parts(_common_texts(rows), tuned).items():
                head = f"{name} ({', '.join(texts)})"
                title = head + (f", fine-tuned on {' + '.join(tuned)}" if tuned else "")
                series = _sweep_series(rows, still, texts, styles)
                panels.append(Panel(lines(title, series, axis, "perplexity", log_x=True)))
    caption = (
        "Drawn as the paper's Figure 3, in and out of the fine-tuning text apart. A method that "
        "does not depend on what was varied has a level line, one that does not overfit is low in "
        "F-OOD too. Lines without marks are rows that do not vary; whiskers are ± the standard "
        "deviation over seeds."
    )
    return Drawing("Against what was varied", caption, panels)


def _sweep_series(
    rows: Sequence[Row], still: Sequence[Row], texts: Sequence[str], styles: Mapping[str, int]
) -> list[Series]:
    series = []
    for name in dict.fromkeys(row.name for row in rows):
        points = sorted(
            (row.key.x.value, row.perplexity(*texts))
            for row in rows
            if row.key.x and row.name == name
        )
        means, spreads = [mean(v) for _, v in points], [spread(v) for _, v in points]
        series.append(Series(name, styles[name], [x for x, _ in points], means, spreads))
    ends = [min(x for one in series for x in one.x), max(x for one in series for x in one.x)]
    for row in still:
        if set(texts) <= set(row.texts()):
            level = mean(row.perplexity(*texts))
            series.append(Series(row.name, styles[row.name], ends, [level] * 2, level=True))
    return series


def _blocks(group: Group, styles: Mapping[str, int]) -> Drawing:
    errors: dict[str, dict[str, dict[str, list[float]]]] = {}  # kind → row → pair → one a seed
    for row in group.rows:
        for result in row.results:
            for pair, block in result.part("blocks").items():
                of_row = errors.setdefault(block["kind"], {}).setdefault(row.label, {})
                of_row.setdefault(pair, []).append(block["error"])
    looks = {}  # rows of one name are told apart
    for row in group.rows:
        same = [other.label for other in group.rows if other.name == row.name]
        looks[row.label] = styles[row.name] + len(styles) * same.index(row.label)
    panels = []
    for kind, of_kind in errors.items():
        places = {
            pair: i
            for i, pair in enumerate(dict.fromkeys(p for of in of_kind.values() for p in of))
        }
        series = [
            Series(label, looks[label], [places[p] for p in of], list(map(mean, of.values())))
            for label, of in of_kind.items()
        ]
        panels.append(Panel(lines(kind, series, "block, in order", "block error", joined=False)))
    caption = (
        "Squared difference between the outputs of a block as the method left it and of the "
        "unquantized one, over the latter’s square, on the calibration samples; a plot a kind of "
        "pair, a mark a block, averaged over seeds. Lower is better; what trained weights compute "
        "otherwise than before counts too, so QAT may lie above PTQ."
    )
    return Drawing("Error of each block", caption, panels)


def _channels(group: Group) -> Iterator[Drawing]:
    for row in group.rows:
        result = row.results[0]
        panels = [
            Panel(channel_ranges(pair, channels), _summary(pair, channels))
            for pair, channels in result.part("channels").items()
        ]
        seed = result.data.get("seed")
        caption = (
            "As the paper's Figure 4; every pair opens. Before, a few channels set the range of "
            "the whole tensor and the others have few levels left; after, the channels should fill "
            "it more evenly. Mind that the axes differ. "
            + ("" if seed is None else f"Seed {seed}.")
        )
        yield Drawing(f"Range of each channel, {row.label}", caption, panels, folded=True)


def _summary(pair: str, channels: Mapping[str, Any]) -> str:
    ends = [channels.get(f"range_{when}") for when in ("before", "after")]
    texts = [f"[{end[0]:.3g}, {end[1]:.3g}]" for end in ends if end]
    return f"{pair}: {' → '.join(texts)}" if texts else pair


def _perplexity_curves(group: Group, styles: Mapping[str, int]) -> Drawing:
    found: dict[tuple[tuple[str, ...], str], list[Series]] = {}  # (fine-tuned on, text) → lines
    for row in group.rows:
        for result in row.results:
            for text, curve in (result.part("curves").get("perplexity") or {}).items():
                line = _curve(row.name, styles[row.name], curve)
                found.setdefault((row.in_distribution, text), []).append(line)
    panels = []
    for (tuned, text), series in found.items():
        (name,) = parts([text], tuned)
        title = f"{text}, {name}, fine-tuned on {' + '.join(tuned)}" if tuned else text
        panels += _panels(series, title, "perplexity")
    caption = (
        "As the paper's Figure 5. Where F-ID falls while F-OOD rises the model overfits; both "
        "should fall together. One line a seed."
    )
    return Drawing("Perplexity while fine-tuning", caption, panels)


def _loss_curves(group: Group, styles: Mapping[str, int]) -> Drawing:
    found: dict[str, list[Series]] = {}  # what a plot is about → lines
    for row in group.rows:
        tuned = f"Fine-tuned on {' + '.join(row.in_distribution)}" if row.in_distribution else ""
        for result in row.results:
            loss = result.part("curves").get("loss") or {}
            if isinstance(loss, Mapping):  # of each block
                some = [_curve(pair, place, loss[pair]) for place, pair in enumerate(loss)]
                if len(some) > LINES_AT_ONCE:
                    ends = found.setdefault(f"{row.label}, the first and the last pair", [])
                    ends += some[0], some[-1]
                found.setdefault(row.label, []).extend(some)
            else:
                line = _curve(row.name, styles[row.name], loss)
                found.setdefault(tuned or row.label, []).append(line)
    panels = [one for title, some in found.items() for one in _panels(some, title, "loss")]
    caption = (
        "As the paper's Figure 6, which has the first and the last norm: a loss that has become "
        "level has converged. One line a seed. "
        "The loss of fine-tuning is of the whole model, that of calibration of a block."
    )
    return Drawing("Loss", caption, panels)


def _curve(name: str, style: int, points: Sequence[Sequence[float]]) -> Series:
    return Series(name, style, [step for step, _ in points], [value for _, value in points])


def _panels(series: Sequence[Series], title: str, y_label: str) -> list[Panel]:
    """Curves over steps, in plots of not too many names each; empty curves are left away."""
    names = list(dict.fromkeys(one.name for one in series if one.x))
    chosen = [names[k : k + LINES_AT_ONCE] for k in range(0, len(names), LINES_AT_ONCE)]
    drawn = [[one for one in series if one.x and one.name in some] for some in chosen]
    return [Panel(lines(title, some, "step", y_label)) for some in drawn]
