"""Pages and committed results, for the tests that hold the one to the other."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def section(page: Path, heading: str) -> str:
    """What stands under a heading of a page."""
    parts = re.split(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return parts[parts.index(heading) + 1]


def rows(text: str) -> list[list[str]]:
    """Cells of each line of a table that has perplexities in it."""
    lines = re.findall(r"^\| (.*\d\.\d\d.*) \|$", text, re.M)
    return [[cell.strip(" *") for cell in line.split("|")] for line in lines]


def recorded(file: str) -> dict[str, Any]:
    """A committed result."""
    path = ROOT / "benchmarks" / "results" / file
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def perplexities(file: str, method: str, residual: int | None = None) -> list[float]:
    """Of a row that `recipes/decoder.py` wrote, one for each text."""
    found = recorded(file)["rows"]
    (row,) = [r for r in found if r["method"] == method and residual in (None, r["residual_bits"])]
    return [*row["perplexity"].values()]


def measured(file: str, method: str, residual: int | None = None, texts: int | None = 2) -> str:
    """Perplexities of such a row on the first texts."""
    return " / ".join(f"{value:.2f}" for value in perplexities(file, method, residual)[:texts])
