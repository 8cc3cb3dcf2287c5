"""Numbers → one small SVG that stands inside a page: no script, no font, nothing fetched.

Each is about as wide as a phone, so that its letters can be read there; wide pages put several
side by side. Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and dashes
tell them apart in grey.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

COLOURS = (
    *("#000000", "#767676", "#56B4E9", "#E69F00"),
    *("#009E73", "#D55E00", "#CC79A7", "#0072B2"),
)
MARKERS = ("o", "X", "s", "^", "D", "v", "P", "*", "<")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (8, 2)), (0, (3, 2)))
WIDTH = 5.2
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "aimet_quadapter",
}


LEGEND_ROW = 0.22
"""Height of a row of the legend, inches."""


@dataclass(frozen=True)
class Series:
    """A named line, or a named set of marks.

    Attributes:
        name: what the legend says.
        style: number that chooses colour, marker and dashes.
        x: where along the x axis; two places for a level that holds for every x.
        y: values.
        spread: ± of each value.
        level: drawn without markers.
        ring: marks are rings around those of other series.
    """

    name: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    level: bool = False
    ring: bool = False

    def look(self, joined: bool) -> dict[str, Any]:
        """How matplotlib draws it."""
        n = self.style
        if self.ring:
            ring = {"marker": "o", "markerfacecolor": "none", "markersize": 11}
            return {"color": COLOURS[0], "linestyle": "", "linewidth": 1.0, **ring}
        return {
            "color": COLOURS[n % len(COLOURS)],
            "marker": "" if self.level else MARKERS[n % len(MARKERS)],
            "linestyle": DASHES[n % len(DASHES)] if joined or self.level else "",
            "linewidth": 1.6,
            "markevery": max(1, len(self.x) // 8) if joined else 1,
        }


@matplotlib.rc_context(STYLE)
def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    joined: bool = True,
) -> str:
    """Lines, or marks at whole x when not `joined`; logarithmic only where that helps.

    Series of one name share one entry in the legend.
    """
    figure, axes = _figure(title, 3.6)
    named: set[str] = set()
    for one in series:
        label = None if one.name in named else one.name
        named.add(one.name)
        whiskers = one.spread if any(one.spread or ()) else None
        axes.errorbar(one.x, one.y, whiskers, capsize=3, label=label, **one.look(joined))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if not joined:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(-0.5, max(x for one in series for x in one.x) + 0.5)
    if log_x:
        _logarithmic(axes, "x", [x for one in series for x in one.x])
    _logarithmic(axes, "y", [y for one in series for y in one.y])
    _legend(figure)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def bars(title: str, names: Sequence[str], groups: Mapping[str, Sequence[float]], unit: str) -> str:
    """Lying bars from the top down, one of each group a name, each with its number.

    The axis begins at 1, the perplexity of a model that is always right; where it is logarithmic
    a bar is as long as the loss.
    """
    count = len(groups)
    height = 0.8 / count
    figure, axes = _figure(title, 1.1 + len(names) * (0.2 + 0.24 * count))
    values = [value for group in groups.values() for value in group]
    looks = (("#0072B2", ""), ("#F5C36B", "////"))
    for k, (name, group) in enumerate(groups.items()):
        colour, hatch = looks[k % 2]
        places = [i + (k - (count - 1) / 2) * height for i in range(len(names))]
        widths = [value - 1 for value in group]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "#333333"}
        bar = axes.barh(places, widths, height * 0.92, 1, label=name, linewidth=0.6, **look)
        axes.bar_label(bar, [number(value) for value in group], padding=3, fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(False, axis="y")
    axes.margins(x=0.18)
    if min(values) > 1 and max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(1, max(values) ** 1.2)
        _log_ticks(axes, "x", max(values))
    _legend(figure)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def channel_ranges(title: str, channels: Mapping[str, Any]) -> str:
    """Min and max of each channel before and after, the whole tensor's range, and α below."""
    parts = [name for name in ("before", "after", "alpha") if channels.get(name)]
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * max(1, len(parts))), layout="constrained")
    figure.suptitle(fill(title, 58), fontsize=12, fontweight="bold")
    for k, name in enumerate(parts):
        axes = figure.add_subplot(len(parts), 1, k + 1)
        if name == "alpha":
            axes.plot(channels[name], color="#D55E00", linewidth=0.8, label="α of each channel")
            axes.set_ylabel("α")
            _logarithmic(axes, "y", channels[name])
        else:
            low, high = channels[name]["min"], channels[name]["max"]
            look: dict[str, Any] = {"color": "#0072B2", "linewidth": 0.5}
            axes.fill_between(range(len(low)), low, high, label="min … max of each channel", **look)
            for end in channels.get(f"range_{name}") or ():
                axes.axhline(end, color="#000000", linestyle=":", label="range of the tensor")
            axes.set_ylabel(f"{name}\n(activation)")
        axes.margins(x=0.01)
        if k == len(parts) - 1:
            axes.set_xlabel("channel")
        else:
            axes.tick_params(labelbottom=False)
    _legend(figure)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def heat(
    title: str,
    values: Any,
    x_label: str,
    y_label: str,
    unit: str,
    limits: tuple[float, float],
) -> str:
    """A picture of a table: rows from the bottom up, a logarithmic scale of colours.

    Args:
        title: above it.
        values: (rows, columns), above 0.
        x_label: of the columns.
        y_label: of the rows.
        unit: what a colour stands for.
        limits: values of the darkest and the lightest colour.
    """
    figure, axes = _figure(title, 3.6)
    image = axes.imshow(
        values,
        cmap="cividis",  # made for colour-blind readers; lighter is more, in grey too
        norm=LogNorm(*limits),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    axes.grid(False)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, label=unit, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return _svg(figure, title)


def number(value: float) -> str:
    """A perplexity as a reader wants it: 29.27, 915.6, 12345, 1.2e+08."""
    if abs(value) >= 1e6:
        return f"{value:.2g}"
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1e4 else 0
    return f"{value:.{digits}f}"


def spread_number(value: float, beside: float) -> str:
    """The ± of a number, with as many digits behind the point as the number has."""
    if abs(beside) >= 1e6:
        return f"{value:.2g}"
    shown = number(beside)
    return f"{value:.{len(shown.partition('.')[2])}f}"


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(fill(title, 58), fontsize=12, fontweight="bold")
    return figure, axes


def _legend(figure: Figure) -> None:
    """Below the plot, which keeps its height; entries of one name are one."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = 1 if max(map(len, found), default=0) > 34 else 2
    rows = -(-len(found) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(rows - 1, 0))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _logarithmic(axes: Axes, side: str, values: Sequence[float]) -> None:
    """A logarithmic axis if the values allow one and span enough to need it."""
    if not values or min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set(**{f"{side}scale": "log"})
    _log_ticks(axes, side, max(values) / min(values))


def _log_ticks(axes: Axes, side: str, span: float) -> None:
    axis = axes.xaxis if side == "x" else axes.yaxis
    steps = (1.0, 2.0, 5.0) if span < 200 else (1.0, 3.0) if span < 3000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=6 if side == "x" else None))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{value:g}")


def _svg(figure: Figure, title: str) -> str:
    """The drawing as an element: scales with the page, has ids of its own, says what it is."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    mark = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    view = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    return f'<svg role="img" aria-label="{html.escape(title)}" {view[0] if view else ""}>{body}'
