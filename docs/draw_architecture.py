"""Draw docs/architecture.svg: the packages and who imports whom, read from the code itself.

    python docs/draw_architecture.py

What a box says and in which order boxes stand comes from the docstring of
`aimet_quadapter/__init__.py`; an arrow is an import. An arrow that others imply is left out
(transitive reduction), and so are arrows to the files that import nothing: they are one strip that
everything may use. Every arrow points up.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import combinations, pairwise, permutations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aimet_quadapter"
FIGURE = ROOT / "docs" / "architecture.svg"

WIDTH, MARGIN = 1060, 20
BOX, GAP, LANE = 196, 12, 40
"""Widths of a box, of the space beside it, and of an arrow that passes a layer."""
HEIGHT, BETWEEN = 66, 44
"""Heights of a layer and of the space below it."""
LETTERS = 30
"""Letters of a description on one line of a box."""

Graph = dict[str, set[str]]
"""Name → the names that it imports."""

Node = str | tuple[str, str]
"""What stands in a layer: a box, or an arrow (from, to) that passes it."""

STYLE = """
  svg { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  .page { fill: #ffffff; }
  .box { fill: #f2f6fb; stroke: #5b7fa8; }
  .strip { fill: #f5f5f5; stroke: #8a8a8a; }
  .name { fill: #14304f; font-size: 15px; font-weight: 600; }
  .what { fill: #333333; font-size: 11.5px; }
  .arrow { fill: none; stroke: #5b7fa8; stroke-width: 1.4; }
  .head { fill: #5b7fa8; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; }
    .box { fill: #16222f; stroke: #6f9bcb; }
    .strip { fill: #1b1f24; stroke: #8a8a8a; }
    .name { fill: #d7e6f7; }
    .what { fill: #c2c7cd; }
    .arrow { stroke: #6f9bcb; }
    .head { fill: #6f9bcb; }
  }
"""


def descriptions() -> dict[str, str]:
    """Each file and package, in order → what the package's docstring says of it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return dict(re.findall(r"^- (\w+): (.*)$", ast.get_docstring(tree) or "", re.M))


def imports(names: Mapping[str, str]) -> Graph:
    """Each file and package → the others that any line of it imports."""
    graph: Graph = {name: set() for name in names}
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[:-1]
        own = folder[0] if folder else path.stem
        if own in names:
            graph[own] |= {name for name in _imported(path, folder) if name in names} - {own}
    return graph


def _imported(path: Path, folder: tuple[str, ...]) -> Iterator[str]:
    """First parts, below the package, of the relative imports of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) + 1 - node.level]
            module = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, *module, alias.name)[0]


def reduced(graph: Graph) -> Graph:
    """The fewest arrows from which all others follow, of a graph without circles."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    return {
        name: {to for to in used if not any(to in reach(other) for other in used)}
        for name, used in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """The layer of each box, from 0 at the top: below all that it imports.

    A box that imports none of the others stands one layer above the first that imports it.
    """
    found: dict[str, int] = {}
    for name in graph:  # what it imports stands before it
        found[name] = max((found[other] + 1 for other in graph[name]), default=0)
    for name in (name for name in graph if not graph[name]):
        users = [found[other] for other in graph if name in graph[other]]
        found[name] = min(users, default=1) - 1
    return found


def layers(graph: Graph) -> list[list[Node]]:
    """Boxes and passing arrows, layer by layer, in the order with the fewest crossings."""
    level = levels(graph)
    rows: list[list[Node]] = [[] for _ in range(max(level.values()) + 1)]
    for name in graph:
        rows[level[name]].append(name)
        for other in sorted(graph[name], key=list(graph).index):
            for between in range(level[other] + 1, level[name]):
                rows[between].append((name, other))
    best: dict[tuple[Node, ...], tuple[float, list[tuple[Node, ...]]]]
    best = {row: (0, [row]) for row in permutations(rows[0])}
    for row in rows[1:]:
        best = {
            lower: min(
                (
                    (cost + _cost(graph, upper, lower), [*above, lower])
                    for upper, (cost, above) in best.items()
                ),
                key=lambda found: found[0],
            )
            for lower in permutations(row)
        }
    _, chosen = min(best.values(), key=lambda found: found[0])
    return [list(row) for row in chosen]


def _cost(graph: Graph, upper: tuple[Node, ...], lower: tuple[Node, ...]) -> float:
    """Crossings between two layers; of as many, the shorter arrows."""
    above, below = _centres(upper), _centres(lower)
    ends = [
        (below[low], above[high])
        for low in lower
        for high in upper
        if _joined(graph, low, high, upper, lower)
    ]
    crossings = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(ends, 2))
    return crossings + sum(abs(a - b) for a, b in ends) / 1e5


def _joined(
    graph: Graph, low: Node, high: Node, upper: tuple[Node, ...], lower: tuple[Node, ...]
) -> bool:
    """Whether a piece of an arrow leads from a node of one layer to a node of the layer above."""
    if isinstance(low, tuple):
        return high == low or (high == low[1] and low not in upper)
    if isinstance(high, tuple):
        return high[0] == low and high not in lower
    return high in graph[low]


def _centres(row: tuple[Node, ...] | list[Node]) -> dict[Node, float]:
    """Where each node of a layer has its middle; the layer stands in the middle of the page."""
    widths = [LANE if isinstance(node, tuple) else BOX for node in row]
    left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
    found: dict[Node, float] = {}
    for node, width in zip(row, widths, strict=True):
        found[node] = left + width / 2
        left += width + GAP
    return found


@dataclass(frozen=True)
class Page:
    """Where everything stands.

    Attributes:
        graph: the arrows.
        rows: boxes and passing arrows, layer by layer.
        top: y of the first layer.
    """

    graph: Graph
    rows: list[list[Node]]
    top: int

    def place(self, node: Node, row: int) -> tuple[float, int]:
        """Middle and upper edge of what stands in a layer."""
        return _centres(self.rows[row])[node], self.top + row * (HEIGHT + BETWEEN)

    def arrow(self, start: str, end: str) -> str:
        """The path of an arrow, from the upper edge of one box to the lower edge of another."""
        row = next(i for i, nodes in enumerate(self.rows) if start in nodes)
        last = next(i for i, nodes in enumerate(self.rows) if end in nodes)
        x, y = self.place(start, row)
        points = [(x + self._port(start, end, row - 1, up=True), float(y))]
        for between in range(row - 1, last, -1):
            x, y = self.place((start, end), between)
            points += [(x, y + HEIGHT), (x, y)]
        x, y = self.place(end, last)
        points.append((x + self._port(end, start, last + 1, up=False), y + HEIGHT + 7))
        path = f"M{points[0][0]:.0f},{points[0][1]:.0f}"
        for (x0, y0), (x1, y1) in pairwise(points):
            half = (y0 + y1) / 2
            path += f" C{x0:.0f},{half:.0f} {x1:.0f},{half:.0f} {x1:.0f},{y1:.0f}"
        return path

    def _port(self, own: str, other: str, beside: int, up: bool) -> float:
        """How far from a box's middle an arrow touches it: in the order of where they lead."""
        arrows = [(own, to) for to in self.graph[own]]
        if not up:
            arrows = [(name, own) for name in self.graph if own in self.graph[name]]
        reached: dict[str, float] = {}
        for arrow in arrows:
            far = arrow[1] if up else arrow[0]
            node: Node = far if far in self.rows[beside] else arrow
            reached[far] = self.place(node, beside)[0]
        ordered = sorted(reached, key=lambda name: (reached[name], name))
        step = min(44, BOX / (len(ordered) + 1))
        return (ordered.index(other) - (len(ordered) - 1) / 2) * step


def label(name: str, what: str, x: float, y: float) -> list[str]:
    """A name and what it is, in the middle of a layer's height from y on."""
    lines = textwrap.wrap(what.replace("`", ""), LETTERS)
    y += 29 - 8 * (len(lines) - 1)
    texts = [f'<text class="name" x="{x:.0f}" y="{y:.0f}">{escape(name)}</text>']
    for number, line in enumerate(lines):
        height = y + 19 + 16 * number
        texts.append(f'<text class="what" x="{x:.0f}" y="{height:.0f}">{escape(line)}</text>')
    return texts


def frame(kind: str, x: float, y: float, width: float) -> str:
    """The rectangle of a box or of the strip, given its middle and upper edge."""
    left = x - width / 2
    return (
        f'<rect class="{kind}" x="{left:.0f}" y="{y:.0f}" width="{width:.0f}" '
        f'height="{HEIGHT}" rx="6"/>'
    )


def strip(names: Mapping[str, str]) -> list[str]:
    """The files that import nothing, side by side in one frame."""
    width = WIDTH - 2 * MARGIN
    parts = [frame("strip", WIDTH / 2, MARGIN, width)]
    for number, (name, what) in enumerate(names.items()):
        parts += label(name, what, MARGIN + width * (number + 0.5) / len(names), MARGIN)
    return parts


def draw() -> str:
    """The figure as SVG."""
    names = descriptions()
    graph = imports(names)
    ground = {name: names[name] for name in graph if not graph[name]}
    above = {name: used - ground.keys() for name, used in graph.items() if name not in ground}
    arrows = reduced(above)
    page = Page(arrows, layers(arrows), MARGIN + HEIGHT + BETWEEN // 2)
    height = page.top + len(page.rows) * (HEIGHT + BETWEEN) - BETWEEN + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" text-anchor="middle" role="img">',
        "<title>The packages of aimet_quadapter; an arrow leads from a package to one that it "
        "imports</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        *strip(ground),
    ]
    for name in arrows:
        for other in sorted(arrows[name]):
            path = page.arrow(name, other)
            parts.append(f'<path class="arrow" marker-end="url(#head)" d="{path}"/>')
    for number, row in enumerate(page.rows):
        for node in row:
            if isinstance(node, str):
                x, y = page.place(node, number)
                parts += [frame("box", x, y, BOX), *label(node, names[node], x, y)]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
    print(f"written to {FIGURE}")
