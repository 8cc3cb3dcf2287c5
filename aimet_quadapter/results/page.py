"""Result files → one HTML page that needs nothing else: tables, plots, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import DataError
from .figures import drawings, parts, spread
from .files import Group, Result, Row, RowKey, load_results, texts_of
from .plots import number, spread_number
from .templates import data, flat, render

ABSENT = "–"


def report(results: str | Path, output: str | Path) -> None:
    """Write what was measured as one HTML page, the paper's numbers beside it.

    The page holds, for each experiment and model, the table, the figures that the results allow,
    time and memory, settings and versions. It needs no script and fetches nothing.

    Args:
        results: folder of result files (`result.schema.json` describes one), searched with its
            subfolders. JSON files that are no results are named on the page.
        output: the page, written anew; its folder is made.

    Raises:
        DataError: there is no such folder, no result in it, a result that is not as the schema
            wants it or of another schema, or one that is there twice.
        OSError: the page cannot be written.
    """
    groups, notes = load_results(results)
    output = Path(output)
    if output.is_dir():
        raise DataError(f"{output} is a folder. Name the page itself, such as {output}/report.html")
    page = _page(groups, notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _page(groups: Sequence[Group], notes: Sequence[str]) -> str:
    paper = json.loads(data("paper.json"))
    experiments: dict[str, Any] = paper["experiments"]
    order = list(experiments)
    ranked = sorted(groups, key=lambda g: _rank(g.key.experiment, order))
    styles = _styles(experiments, ranked)
    titles = {g.key.experiment: title for g in reversed(ranked) if (title := _title(g.rows))}
    titles |= {name: entry["title"] for name, entry in experiments.items()}
    sections = [
        _section(
            g,
            experiments.get(g.key.experiment, {}),
            titles.get(g.key.experiment, g.key.experiment),
            styles,
        )
        for g in ranked
    ]
    measured = {group.key.experiment for group in groups}
    return render(
        "report.html.jinja",
        paper=paper,
        sections=sections,
        others=[section for section in sections if section["other_model"]],
        missing=[entry["title"] for name, entry in experiments.items() if name not in measured],
        notes=notes,
    )


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _styles(experiments: Mapping[str, Any], groups: Iterable[Group]) -> dict[str, int]:
    """Row name → number of its look, the same in every plot of the page."""
    names = [row["row"] for entry in experiments.values() for row in entry["rows"]]
    names += [row.name for group in groups for row in group.rows]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _section(
    group: Group, entry: Mapping[str, Any], title: str, styles: Mapping[str, int]
) -> dict[str, Any]:
    """What the template needs of one experiment on one model."""
    keys = [_key(row) for row in entry.get("rows", ())]
    rows = sorted(group.rows, key=lambda row: _order(row, keys, styles))
    known = sum(row.key in keys for row in rows)
    more = f" and {len(rows) - known} more" if len(rows) > known else ""
    ordered = Group(group.key, tuple(rows))
    seeds = sorted({len(row.results) for row in rows})
    return {
        "id": re.sub(r"\W+", "-", "-".join(filter(None, group.key))).lower(),
        "key": group.key,
        "title": title,
        "note": entry.get("note", ""),
        "other_model": bool(keys) and not _same_model(group, entry),
        "paper_model": entry.get("model"),
        "seeds": " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]]))),
        "measured": f"{known} of the paper’s {len(keys)}{more}" if keys else len(rows),
        "table": _table(ordered, entry.get("rows", ())),
        "uneven": _uneven(rows),
        "figures": drawings(ordered, styles),
        "costs": _costs(rows),
        "settings": _facts(rows, "settings"),
        "stamps": _facts(rows, "stamp"),
    }


def _title(rows: Iterable[Row]) -> str | None:
    """The heading that the results themselves give."""
    return next((r.data["title"] for row in rows for r in row.results if "title" in r.data), None)


def _order(row: Row, keys: Sequence[RowKey], styles: Mapping[str, int]) -> tuple[Any, ...]:
    """Where a row stands: as in the paper, others behind, each line of a sweep together."""
    name, finetuned_on, x = row.key
    place = keys.index(row.key) if row.key in keys else len(keys)
    return place, finetuned_on, styles[name], x is not None, x or ()


def _same_model(group: Group, entry: Mapping[str, Any]) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", group.key.model.rsplit("/", 1)[-1].lower())
    wanted = re.sub(r"[^a-z0-9]", "", str(entry.get("model")).lower())
    return plain == wanted


def _table(group: Group, paper_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Head and body of the table: the paper's rows first, measured or not."""
    paper = {_key(row): row for row in paper_rows}
    measured = {row.key: row for row in group.rows}
    found: list[Iterable[str]] = [row["perplexity"] for row in paper_rows]
    found += [result.part("perplexity") for row in group.rows for result in row.results]
    texts = list(dict.fromkeys(text for some in found for text in some))
    known = {text for row in paper_rows for text in row["perplexity"]}
    texts.sort(key=lambda text: text in known)  # other texts are seen without scrolling
    if not texts:
        return None
    averages = ["F-ID", "F-OOD"] if any("average" in row for row in paper_rows) else []
    tuned = {row.in_distribution for row in group.rows} | {key.finetuned_on for key in paper}
    shared = max(tuned) if len(tuned - {()}) == 1 else ()
    body = []
    for key in dict.fromkeys([*paper, *measured]):
        row, theirs = measured.get(key), paper.get(key, {})
        own = row.in_distribution if row else key.finetuned_on
        split = parts(texts, own or shared)
        pairs = [(_theirs(theirs, "perplexity", t), _ours(row, [t]), t in own) for t in texts]
        for name in averages:
            pair = _theirs(theirs, "average", name), _ours(row, split.get(name, [])), False
            pairs.append(pair)
        seeds = str(len(row.results)) if row else ABSENT
        x = f"{key.x.value:g}" if key.x else ABSENT
        tuned_on = _briefly(key.finetuned_on)
        body.append({"key": key, "tuned_on": tuned_on, "x": x, "pairs": pairs, "seeds": seeds})
    axes = dict.fromkeys(key.x.name for key in measured if key.x)
    heads = [*texts, *(f"mean {name}" for name in averages)]
    return {"heads": heads, "paired": bool(paper), "x": ", ".join(axes), "rows": body}


def _briefly(texts: Sequence[str]) -> str:
    """What a cell says of the fine-tuning texts; the underlined numbers say which they are."""
    return f"{len(texts)} texts" if len(texts) > 2 else " + ".join(texts) or ABSENT


def _key(paper_row: Mapping[str, Any]) -> RowKey:
    return RowKey(paper_row["row"], texts_of(paper_row["finetune_text"]), None)


def _theirs(row: Mapping[str, Any], part: str, name: str) -> str:
    value = row.get(part, {}).get(name)
    return ABSENT if value is None else f"{value:.2f}"


def _ours(row: Row | None, texts: Sequence[str]) -> tuple[str, str]:
    """Mean over the seeds that measured these texts, and its spread or what else is to be said."""
    values = row.perplexity(*texts) if row and texts else []
    if not row or not values:
        return ABSENT, ""
    middle = mean(values)
    beside = f"± {spread_number(spread(values), middle)}" if len(values) > 1 else ""
    if len(values) < len(row.results):
        beside += f" ({len(values)} of the seeds)"
    return number(middle), beside


def _uneven(rows: Iterable[Row]) -> list[str]:
    """Rows whose seeds were not measured with the same settings."""
    found = []
    for row in rows:
        settings = [dict(flat(result.part("settings"))) for result in row.results]
        names = sorted({name for one in settings for name in one if name != "seed"})
        odd = [name for name in names if len({one.get(name) for one in settings}) > 1]
        if odd:
            found.append(f"{row.label}: {', '.join(odd)}")
    return found


def _costs(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Mean seconds of each stage and the largest peak memory, a row each."""
    rows = [
        r for r in rows if any({"seconds", "peak_memory_gib"} & x.data.keys() for x in r.results)
    ]
    stages = list(dict.fromkeys(s for row in rows for x in row.results for s in x.part("seconds")))
    body = []
    for row in rows:
        cells = []
        for stage in stages:
            found = [s[stage] for x in row.results if stage in (s := x.part("seconds"))]
            cells.append(f"{mean(found):.1f}" if found else ABSENT)
        peaks = [p for x in row.results if (p := x.data.get("peak_memory_gib")) is not None]
        body.append((row.label, [*cells, f"{max(peaks):.2f}" if peaks else ABSENT]))
    return {"stages": stages, "rows": body} if body else None


def _facts(rows: Iterable[Row], part: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name → its values, each with the rows that have it, or without when all have the same."""
    found: dict[str, dict[str, list[str]]] = {}
    results: list[tuple[Row, Result]] = [(row, result) for row in rows for result in row.results]
    for row, result in results:
        for name, value in flat(result.part(part)):
            found.setdefault(name, {}).setdefault(value, []).append(row.label)
    facts = []
    for name, values in found.items():
        alone = len(values) == 1 and len(next(iter(values.values()))) == len(results)
        facts.append(
            (
                name,
                [(v, "" if alone else "; ".join(dict.fromkeys(who))) for v, who in values.items()],
            )
        )
    return facts
