"""Result files → checked results → the rows of each experiment, one result a seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from ..errors import DataError

SCHEMA = 1


class Sweep(NamedTuple):
    """Where on the axis of a sweep a row stands."""

    name: str
    value: float


@dataclass(frozen=True)
class Result:
    """One result file: what `result.schema.json` describes, as it stands there."""

    file: str
    """Path inside the folder of results."""
    data: Mapping[str, Any]

    @property
    def row(self) -> RowKey:
        x = self.data.get("x")
        return RowKey(
            self.data["row"],
            texts_of(self.data.get("finetune_text")),
            Sweep(x["name"], x["value"]) if x else None,
        )

    @property
    def group(self) -> GroupKey:
        changes = (f"{key}={value}" for key, value in sorted(self.part("changes").items()))
        return GroupKey(
            self.data["experiment"], self.data["model"], self.data["scale"], ", ".join(changes)
        )

    def part(self, name: str) -> Mapping[str, Any]:
        """An optional part, empty when it was not measured."""
        return self.data.get(name) or {}


class RowKey(NamedTuple):
    """What is the same in all results of a row."""

    name: str
    finetuned_on: tuple[str, ...]
    x: Sweep | None


class GroupKey(NamedTuple):
    """What is the same in all rows of a table."""

    experiment: str
    model: str
    scale: str
    changes: str
    """Settings that are not the experiment's own."""


@dataclass(frozen=True)
class Row:
    """One row of a table: the same thing measured under one or more seeds."""

    key: RowKey
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def label(self) -> str:
        """The name with what tells it from its neighbours."""
        texts = f", fine-tuned on {' + '.join(self.key.finetuned_on)}"
        x = self.key.x
        return "".join(
            [
                self.name,
                texts if self.key.finetuned_on else "",
                f", {x.name} {x.value:g}" if x else "",
            ]
        )

    @property
    def in_distribution(self) -> tuple[str, ...]:
        """The texts that are F-ID for this row, sorted."""
        given = self.results[0].data.get("in_distribution") or self.key.finetuned_on
        return tuple(sorted(given))

    def texts(self) -> list[str]:
        """Texts with a perplexity under every seed."""
        first, *others = (result.part("perplexity") for result in self.results)
        return [text for text in first if all(text in other for other in others)]

    def perplexity(self, *texts: str) -> list[float]:
        """Mean over the texts, one number a seed; seeds that lack one of them are left out."""
        found = (result.part("perplexity") for result in self.results)
        return [sum(p[t] for t in texts) / len(texts) for p in found if p.keys() >= set(texts)]


@dataclass(frozen=True)
class Group:
    """An experiment measured on one model at one scale."""

    key: GroupKey
    rows: tuple[Row, ...]


def texts_of(finetune_text: str | None) -> tuple[str, ...]:
    """The texts that `A + B` joins."""
    return tuple(sorted(text.strip() for text in (finetune_text or "").split("+") if text.strip()))


def load_results(folder: str | Path) -> tuple[list[Group], list[str]]:
    """Read every result below a folder.

    Args:
        folder: searched with its subfolders for `*.json`.

    Returns:
        The groups, in the order of their files' names, and a line on each JSON file that was left
        out because it is no result, or that has fields nobody knows.

    Raises:
        DataError: there is no such folder or no result in it, a result is of another schema or
            has a field that is not as the schema wants it, or two results are of the same
            experiment, model, scale, row and seed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name the one that holds the result files.")
    results: list[Result] = []
    notes: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        data = _read(path)
        if isinstance(data, str):
            notes.append(f"{name} is left out: {data}.")
            continue
        results.append(Result(name, _checked(name, data)))
        if unknown := sorted(data.keys() - _validator().schema["properties"].keys()):
            notes.append(f"{name} has fields that are not shown: {', '.join(unknown)}.")
    if not results:
        raise DataError(" ".join([f"{folder} holds no result file (*.json).", *notes]))
    return _grouped(results), notes


def _read(path: Path) -> dict[str, Any] | str:
    """A result as it stands in its file, or why the file is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, line {error.lineno})"
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(data, dict) or not {"schema", "experiment", "row"} <= data.keys():
        return "not a result, which has the fields schema, experiment and row"
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no measured number. Measure again, or remove the file.")


@cache
def _validator() -> Any:
    text = (files(__package__) / "result.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))


def _checked(name: str, data: dict[str, Any]) -> dict[str, Any]:
    if data["schema"] != SCHEMA:
        raise DataError(
            f"{name} is of schema {data['schema']}; this version reads schema {SCHEMA}. Use the "
            "version of aimet_quadapter that the result was written for, or measure again."
        )
    if error := best_match(_validator().iter_errors(data)):
        where = re.sub(r"^\$\.?", "", error.json_path) or "the result"
        raise DataError(f"{name}: {where}: {error.message[:200]}. result.schema.json says how.")
    for pair, channels in (data.get("channels") or {}).items():
        lengths = {
            len(values)
            for values in (
                channels.get("alpha"),
                *(channels.get("before") or {}).values(),
                *(channels.get("after") or {}).values(),
            )
            if values is not None
        }
        if len(lengths) > 1:
            raise DataError(f"{name}: channels of {pair} have lengths {sorted(lengths)}; one each.")
    return data


def _grouped(results: Iterable[Result]) -> list[Group]:
    table: dict[GroupKey, dict[RowKey, dict[int | None, Result]]] = {}
    for result in results:
        seeds = table.setdefault(result.group, {}).setdefault(result.row, {})
        seed = result.data.get("seed")
        if seed in seeds:
            where = ", ".join([*filter(None, result.group), result.row.name, str(seed)])
            raise DataError(
                f"{seeds[seed].file} and {result.file} are of the same experiment, model, scale, "
                f"settings, row and seed ({where}). Keep one."
            )
        seeds[seed] = result
    return [
        Group(key, tuple(Row(row, tuple(seeds.values())) for row, seeds in rows.items()))
        for key, rows in table.items()
    ]
