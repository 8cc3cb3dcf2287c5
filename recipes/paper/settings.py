"""Settings of a run: which there are, what each may be, how one set overrides another."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from aimet_quadapter import CalibrationConfig, FinetuneConfig

SITES = ("paper", "modules", "all")
KINDS: dict[str, type] = {
    "model": str,
    "weight_bits": int,
    "activation_bits": int,
    "config_file": str,
    "adaround_iterations": int,
    "adascale_iterations": int,
    "channels": list,
    "seeds": list,
    "calibration.text": str,
    "calibration.split": str,
    "finetuning.split": str,
    "evaluation.texts": list,
    "evaluation.split": str,
    "watch.every": int,
    "watch.texts": list,
}
STAGES: dict[str, type] = {
    "phase1": CalibrationConfig,
    "phase2": FinetuneConfig,
    "qat": FinetuneConfig,
}

COUNTS = (
    "calibration.samples",
    "calibration.length",
    "finetuning.samples",
    "finetuning.batch",
    "finetuning.length",
    "evaluation.tokens",
    "evaluation.window",
    "watch.tokens",
)
"""Settings that are a number of something."""

TEXTS = ("evaluation.texts", "watch.texts")
"""Settings that are names of texts."""

ALL_WHEN_NONE = {"finetuning.samples", "evaluation.tokens", "watch.tokens"}
"""Those of them that may be null."""


class ExperimentError(ValueError):
    """An experiment's file, or what was asked of it, cannot be."""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`base` with some values replaced; keys that `base` lacks are an error.

    What is given to a stage (phase1, phase2, qat) are changes to its preset: any field of its
    settings.
    """
    result = copy.deepcopy(dict(base))
    check_keys(changes, result.keys(), where)
    for key, value in changes.items():
        if key in STAGES:
            fields = {"preset", *STAGES[key].__dataclass_fields__}  # type: ignore[attr-defined]
            fields -= {"seed"}  # the run's own
            check_keys(value, fields, f"{where}, {key}")
            result[key] = {**result[key], **value}
        elif isinstance(result[key], dict):
            result[key] = merge(result[key], value, f"{where}, {key}")
        else:
            result[key] = value
    return result


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise ExperimentError unless every value is of its kind and every stage can be made."""
    for key, kind in KINDS.items():
        value = _at(settings, key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ExperimentError(f"{where}: {key} is {value!r}; expected {kind.__name__}.")
        if key in TEXTS and not all(isinstance(text, str) for text in value):
            raise ExperimentError(f"{where}: {key} is {value!r}; expected names of texts.")
    if not settings["evaluation"]["texts"]:
        raise ExperimentError(f"{where}: evaluation.texts is empty; give at least one.")
    if settings["sites"] not in SITES:
        wanted = ", ".join(SITES)
        raise ExperimentError(f"{where}: sites is {settings['sites']!r}; there are {wanted}.")
    for name in STAGES:
        try:
            stage(settings, name, 0)
        except (TypeError, ValueError) as e:
            raise ExperimentError(f"{where}, {name}: {e}") from e
    if not settings["seeds"]:
        raise ExperimentError(f"{where}: seeds is empty; give at least one.")
    for key in COUNTS:
        value = _at(settings, key)
        allowed = value is None and key in ALL_WHEN_NONE
        if not allowed and (type(value) is not int or value < 1):
            also = ", or null for all there is" if key in ALL_WHEN_NONE else ""
            raise ExperimentError(f"{where}: {key} is {value!r}; expected 1 or more{also}.")


def stage(settings: Mapping[str, Any], name: str, seed: int) -> Any:
    """The settings object of a stage: its preset with the changes of the experiment.

    Raises:
        ValueError: a value that cannot be.
    """
    kind: Any = STAGES[name]
    changes = {k: v for k, v in settings[name].items() if k != "preset"}
    if "seed" in kind.__dataclass_fields__:
        changes["seed"] = seed
    preset = settings[name]["preset"]
    known = ("paper",) if name == "qat" else ("paper", "default")
    if preset not in known:
        raise ExperimentError(f"there is no preset {preset!r}; there are {', '.join(known)}.")
    if name == "qat":
        return FinetuneConfig.qat(**changes)
    return kind.paper(**changes) if preset == "paper" else kind(**changes)


def parse_changes(pairs: Iterable[str]) -> dict[str, Any]:
    """`["qat.steps=10"]` → `{"qat.steps": 10}`; a value is JSON, or a string as it stands."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ExperimentError(f"--set {pair}: write key=value, e.g. --set qat.steps=10.")
        try:
            result[key] = json.loads(text)
        except json.JSONDecodeError:
            result[key] = text
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def check_keys(
    data: Mapping[str, Any], known: Iterable[str], where: str, required: Iterable[str] = ()
) -> None:
    if not isinstance(data, Mapping):
        raise ExperimentError(f"{where}: expected an object with keys, got {data!r}.")
    for key in data:
        if key not in set(known):
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
            raise ExperimentError(f"{where}: unknown key {key!r}.{hint}")
    for key in sorted(set(required) - data.keys()):
        raise ExperimentError(f"{where}: the key {key!r} is missing.")


def _at(settings: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings
