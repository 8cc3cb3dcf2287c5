"""An experiment's files → the runs it consists of: checked settings, nothing measured.

`experiments/defaults.json` holds every setting, an experiment overrides some, and `--scale small`
some more ("small" in either file). A key that the defaults do not have is an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimet_quadapter.evaluation.texts import text_name

from .settings import ExperimentError, check, check_keys, merge, nested, stage

EXPERIMENTS = Path(__file__).parent / "experiments"
SCALES = ("paper", "small")
KEYS = {"title", "settings", "rows", "finetune_texts", "sweep", "small", "slow"}
ROW_KEYS = {"row", "methods", "finetune", "settings"}
SWEEP_KEYS = {"key", "name", "values"}


@dataclass(frozen=True)
class RunSpec:
    """One row under one seed.

    Attributes:
        experiment: name of the experiment, e.g. "table1/gpt2".
        title: its heading.
        row: name of the row, as in the paper.
        methods: names of the methods, in order.
        scale: "paper" or "small".
        finetune_texts: what the row is fine-tuned on; empty without.
        x: (name, value) of a sweep's place, or None.
        seed: of every random choice.
        settings: every setting, resolved, but for the seeds.
        changes: the settings, seeds and model aside, that came before the experiment's own.
    """

    experiment: str
    title: str
    row: str
    methods: tuple[str, ...]
    scale: str
    finetune_texts: tuple[str, ...]
    x: tuple[str, float] | None
    seed: int
    settings: Mapping[str, Any]
    changes: Mapping[str, Any]

    def stage(self, name: str) -> Any:
        """The settings object of a stage, under this seed."""
        return stage(self.settings, name, self.seed)

    @property
    def file(self) -> str:
        """Where its result lies in the folder of results; changed settings make another one."""
        parts = [self.row, *self.finetune_texts]
        parts += [f"{self.x[1]:g}"] if self.x else []
        model = _slug(str(self.settings["model"]).rstrip("/").rpartition("/")[2])
        if self.changes:
            stated = json.dumps(self.changes, sort_keys=True)
            parts += [hashlib.sha256(stated.encode()).hexdigest()[:8]]
        place = f"{self.scale}/{model}/{self.experiment}/{'_'.join(map(_slug, parts))}"
        return f"{place}_seed{self.seed}.json"


def names(slow: bool = True) -> list[str]:
    """Every experiment, or all but those marked slow."""
    files = EXPERIMENTS.rglob("*.json")
    found = [f.relative_to(EXPERIMENTS).with_suffix("").as_posix() for f in files]
    every = sorted(set(found) - {"defaults"})
    return [name for name in every if slow or not _read(name).get("slow")]


def specs(
    name: str,
    scale: str = "paper",
    changes: Mapping[str, Any] | None = None,
    finetune_texts: Sequence[str] | None = None,
) -> Iterator[RunSpec]:
    """The runs of an experiment.

    Args:
        name: one of `names()`.
        scale: "paper", or "small" for what ends within an hour on 2 cores.
        changes: settings that come before all others, e.g. {"qat.steps": 10}. Other than the
            model and the seeds they make a "small" run, apart from those without them.
        finetune_texts: instead of the experiment's; several joined by "+" are one.

    Raises:
        ExperimentError: no such experiment, a key or value in its file that cannot be, or a
            change of what the experiment sweeps.
    """
    defaults, chosen = _read("defaults"), _read(name)
    parts = [defaults, chosen]
    if scale not in SCALES:
        raise ExperimentError(f"there is no scale {scale!r}; there are {', '.join(SCALES)}.")
    if scale == "small":
        parts = [defaults, chosen, defaults.get("small", {}), chosen.get("small", {})]
    settings = defaults["settings"]
    for part in parts[1:]:
        settings = merge(settings, part.get("settings", {}), name)
    changes = dict(changes or {})
    other = {k: v for k, v in changes.items() if k not in ("model", "seeds")}
    texts = finetune_texts or _last(parts, "finetune_texts") or []
    sweep = _last(parts, "sweep")
    if sweep:
        check_keys(sweep, SWEEP_KEYS, f"{name}, sweep", SWEEP_KEYS)
        if sweep["key"] in changes:
            raise ExperimentError(
                f"{name} runs through values of {sweep['key']}: it cannot be set to one."
            )
    for number, row in enumerate(_last(parts, "rows") or [], 1):
        check_keys(row, ROW_KEYS, f"{name}, row {number}", {"row", "methods"})
        own = merge(settings, row.get("settings", {}), f"{name}, row {row['row']}")
        for key, value in changes.items():
            own = merge(own, nested(key, value), "the command line")
        tuned = [_texts(t) for t in texts] if row.get("finetune") else [()]
        points: list[tuple[Any, dict[str, Any]]] = [(None, own)]
        if sweep and row.get("finetune"):
            points = [(v, merge(own, nested(sweep["key"], v), name)) for v in sweep["values"]]
        for _, at in points:
            check(at, f"{name}, row {row['row']}")
            _name_texts(at)
        for text, (value, at) in itertools.product(tuned, points):
            resolved = {k: v for k, v in at.items() if k != "seeds"}
            for seed in at["seeds"]:
                yield RunSpec(
                    experiment=name,
                    title=chosen.get("title", name),
                    row=row["row"],
                    methods=tuple(row["methods"]),
                    scale="small" if other else scale,
                    finetune_texts=text,
                    x=None if value is None else (sweep["name"], value),
                    seed=seed,
                    settings=resolved,
                    changes=other,
                )


def _name_texts(settings: dict[str, Any]) -> None:
    """Call every text what the paper calls it."""
    settings["calibration"]["text"] = text_name(settings["calibration"]["text"])
    for part in ("evaluation", "watch"):
        settings[part]["texts"] = [text_name(text) for text in settings[part]["texts"]]


def _read(name: str) -> dict[str, Any]:
    file = EXPERIMENTS / f"{name}.json"
    if not file.is_file():
        raise ExperimentError(f"there is no experiment {name!r}; there are {', '.join(names())}.")
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ExperimentError(f"{file}: not JSON ({e}).") from e
    check_keys(data, KEYS, name)
    check_keys(data.get("small", {}), KEYS - {"small", "title", "slow"}, f"{name}, small")
    return data


def _last(parts: Iterable[Mapping[str, Any]], key: str) -> Any:
    """The value of a key in the last part that has it."""
    return next((p[key] for p in reversed(list(parts)) if key in p), None)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower())


def _texts(text: str) -> tuple[str, ...]:
    return tuple(text_name(t.strip()) for t in text.split("+"))
