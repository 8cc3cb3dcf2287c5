"""The ranges of the channels of a pair that the reader picks: a chart of Bokeh, its code inside.

Numbers are written with the upper half of their bits as 32-bit floats (bfloat16: 0.4 % of the
number, small ones too), in base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.layouts import gridplot
from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources

from .run_facts import Floats, PairFacts

SOURCE = "channels"
"""Name that the page's script finds the data source by, and id of the element that holds the
chart."""

COLUMNS = ("channel", "low_before", "high_before", "low_after", "high_after", "alpha")

WIDTH = 690
"""Widest that the chart becomes, in pixels: what fits on a printed A4."""


def script() -> str:
    """Bokeh's own code, without its widgets: what the chart needs."""
    found: Sequence[str] = Resources(mode="inline", components=["bokeh"]).js_raw
    return "\n".join(found).replace("</script", "<\\/script")


def chart() -> str:
    """The empty chart as JSON that `Bokeh.embed.embed_item` takes."""
    source = ColumnDataSource({name: [] for name in COLUMNS}, name=SOURCE)
    channels = Range1d(name="channels_range", start=0, end=1)
    before, after, alpha = (
        _panel(title, channels)
        for title in ("before: min … max of each channel", "after", "α of each channel")
    )
    for panel, when in ((before, "before"), (after, "after")):
        panel.vbar(
            x="channel",
            bottom=f"low_{when}",
            top=f"high_{when}",
            width=0.9,
            color="#0072B2",
            source=source,
        )
        _hover(panel, [("min … max", f"@low_{when}{{0.[000]}} … @high_{when}{{0.[000]}}")])
    alpha.scatter(x="channel", y="alpha", size=3, color="#D55E00", source=source)
    _hover(alpha, [("α", "@alpha{0.[0000]}")])
    alpha.xaxis.axis_label = "channel"
    panels = [[before], [after], [alpha]]
    grid = gridplot(
        panels,
        sizing_mode="stretch_width",
        toolbar_location="above",
        toolbar_options={"logo": None},
    )
    grid.update(max_width=WIDTH)
    return _json(json_item(grid, ID(SOURCE)))


def _panel(title: str, channels: Range1d) -> Any:
    panel = figure(
        title=title,
        height=190,
        max_width=WIDTH,
        sizing_mode="stretch_width",
        x_range=channels,
        y_axis_type="log" if title.startswith("α") else "linear",
        tools="xbox_zoom,xpan,xwheel_zoom,reset",
        active_drag=None,  # a finger that scrolls the page must not zoom
        active_scroll=None,
    )
    panel.yaxis.minor_tick_line_color = None
    return panel


def _hover(panel: Any, more: list[tuple[str, str]]) -> None:
    tips = [("channel", "@channel"), *more]
    panel.add_tools(HoverTool(tooltips=tips, mode="mouse", visible=False))


def data(pairs: Sequence[PairFacts]) -> str:
    """All pairs as JSON: what the list shows, and the channels of each."""
    return _json([_of(pair) for pair in pairs])


def _of(pair: PairFacts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": pair.name,
        "kind": pair.kind,
        "kept": pair.kept,
        "crossed": pair.crossed,
        "losses": {name: float(f"{loss:.4g}") for name, loss in pair.losses.items()},
        "alpha": packed(pair.alpha),
    }
    for when, ends in (("before", pair.before), ("after", pair.after)):
        if ends is not None:
            found[f"low_{when}"], found[f"high_{when}"] = packed(ends[0]), packed(ends[1])
    return found


def packed(values: Floats) -> str:
    """The upper 16 bits of each float32, rounded to the nearest, little-endian, in base64."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return base64.b64encode(((bits + 0x8000) >> 16).astype("<u2").tobytes()).decode()


def unpacked(text: str) -> Floats:
    """What `packed` wrote; float32, within 0.4 % of what it was given."""
    high = np.frombuffer(base64.b64decode(text), "<u2").astype("<u4")
    return (high << 16).view("<f4").astype(np.float32)


def widest(pairs: Sequence[PairFacts]) -> int:
    """Which pair to show first: that whose largest channel lies farthest above its median one."""
    spread = [0.0 if p.before is None else _spread(p.before) for p in pairs]
    return spread.index(max(spread)) if spread else 0


def _spread(ends: Floats) -> float:
    largest = np.abs(ends).max(0)
    return float(largest.max() / max(float(np.median(largest)), 1e-30))


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
