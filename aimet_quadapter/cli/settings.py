"""Settings of `quadapter run`: each a key of a recipe's file and a flag of the same name.

What is asked for lies over the recipe's file, which lies over what its tier sets, which lies over
the defaults; a tier that is asked for lies over the file too. docs/settings.md is written from this
module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..config import ROTATIONS, CalibrationConfig, FinetuneConfig
from ..errors import DataError

EMBEDDED = "embedded"
"""Name of the model inside the package."""

RECIPE = "recipe"
"""Key of `result.json` with the settings of its run, so that the file is a recipe itself."""


TIERS: dict[str, dict[str, Any]] = {
    "fast": {"samples": 4, "calibration": {"steps": 20}},
    "default": {},
    "best": {
        "samples": 16,
        "calibration": {"choice": "layer"},
        "compensate_softmax": True,
        "phase_2": True,
        "finetuning": {"steps": 100, "loss": "distillation"},
    },
    "paper": {
        "samples": 10,
        "prefix": "none",
        "rotate": "none",
        "calibration": {k: v for k, v in asdict(CalibrationConfig.paper()).items() if k != "seed"},
        "finetuning": asdict(FinetuneConfig.paper()),
    },
}
"""Tier → what it sets otherwise than the defaults."""

Bits = Annotated[int, Field(ge=4, le=16)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[list[str], Field(min_length=1)]


class Settings(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(EMBEDDED, description="hub name or local folder")
    tier: Literal["fast", "default", "best", "paper"] = Field(
        "default", description="defaults of other settings, by how long it may take"
    )
    calibration_text: Names = Field(
        ["built-in"], description="UTF-8 files or names of texts (validation), read as one"
    )
    evaluation_text: Names = Field(
        ["built-in"], description="UTF-8 files or names of texts (test), each measured by itself"
    )
    text_dir: str | None = Field(None, description="folder of texts by name, instead of the hub")
    samples: Count = Field(8, description="calibration samples, from all over the text")
    length: Count | None = Field(None, description="tokens of a sample (512, or the positions)")
    window: Count | None = Field(None, description="tokens of an evaluation window (as length)")
    eval_tokens: Count = Field(8192, description="tokens to evaluate, of each text")
    bos: bool = Field(True, description="begin each window as the tokenizer begins a prompt")
    bits: tuple[Bits, Bits] = Field((8, 8), description="bits of weights, of everything else")
    residual_bits: Bits | None = Field(None, description="bits of the residual stream (as bits)")
    table_bits: Bits | None = Field(None, description="bits of weights of head and embeddings")
    norm_weight_bits: Bits | None = Field(
        None, description="bits of weights of norms (the more of the two of bits)"
    )
    config_file: str = Field("htp_v73", description="AIMET config, name or JSON file")
    prefix: Literal["auto", "none"] | list[int] | None = Field(
        None,
        description="token ids before every text, auto or none "
        "(auto for models with RMSNorm, none for others)",
    )
    rotate: Literal["auto", "hadamard", "random", "none"] | None = Field(
        None,
        description="turn the residual stream; auto: hadamard where the quantized model gains "
        "(auto for models with RMSNorm, none for others)",
        json_schema_extra={"const": ROTATIONS[0]},
    )
    calibration: CalibrationConfig = Field(
        CalibrationConfig(), description="phase 1, see CalibrationConfig"
    )
    compensate_softmax: bool = Field(False, description="make up for what an 8-bit softmax loses")
    choose_ranges: bool = Field(False, description="clip ranges where the loss says so")
    assign_bits: Annotated[int, Field(ge=0)] = Field(
        0, description="activations that may get 16 bits, at most"
    )
    phase_2: bool = Field(False, description="fine-tune α and ranges end to end")
    finetune_text: Names | None = Field(
        None, description="text of phase 2, and phase 2 with it (else the calibration samples)"
    )
    finetuning: FinetuneConfig = Field(FinetuneConfig(), description="phase 2, see FinetuneConfig")
    seed: int = Field(0, description="seed of every random choice")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 … (the GPU if there is one)")
    output: str = Field("quadapter-out", description="folder")
    export: bool = Field(True, description="write ONNX, encodings, QDQ and a manifest")
    report: bool = Field(True, description="write report.html: what the run did and found")
    opset: Literal[21, 22, 23] = Field(23, description="ONNX opset of the export")
    generation: tuple[Count, Count] | None = Field(
        None, description="write graphs that generate text, of this many prompt and cache tokens"
    )
    save_huggingface: bool = Field(False, description="write a HuggingFace checkpoint with α in it")
    adapter: Names | None = Field(
        None, description="folders of LoRA adapters of the model, to be written for that checkpoint"
    )

    @field_validator("prefix", mode="before")
    @classmethod
    def _prefix(cls, value: Any) -> Any:
        words = [str(v) for v in value] if isinstance(value, list) else [value]
        if value == []:
            return "none"
        if len(words) == 1 and words[0] in ("auto", "none", None):
            return words[0]
        if not isinstance(value, list) or not all(word.isdecimal() for word in words):
            raise ValueError("pass token ids, or auto or none alone")
        return [int(word) for word in words]

    @field_validator("bits", "opset", "generation", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(cls._numbers, value))
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @model_validator(mode="after")
    def _adapter(self) -> Settings:
        if self.adapter and not self.save_huggingface:
            raise ValueError("adapter is for the checkpoint, and save_huggingface is false")
        if self.adapter and self.phase_2 and self.finetuning.lr_weights:
            raise ValueError(
                "adapter fits scaled weights, and finetuning.lr_weights trains others: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _phase_2(self) -> Settings:
        if self.finetune_text and not self.phase_2:
            raise ValueError("finetune_text is the text of phase 2, and phase_2 is false")
        if self.compensate_softmax and self.samples < 2:
            raise ValueError("compensate_softmax needs samples of 2 or more")
        return self


NESTED = {n for n, field in Settings.model_fields.items() if is_dataclass(field.annotation)}
"""Settings that hold others."""

SHORT = {
    "steps": ("calibration", "steps"),
    "finetune_steps": ("finetuning", "steps"),
    "finetune_loss": ("finetuning", "loss"),
}
"""Flag of its own → the setting inside another that it is short for."""


def resolve(asked: Mapping[str, Any], file: Path | None = None) -> Settings:
    """All settings of a run.

    Args:
        asked: key → value, as from a shell; those of `SHORT` too.
        file: a recipe, YAML or JSON, or the `result.json` of another run.

    Raises:
        DataError: a key or a value that no setting has; it names the nearest one.
        OSError: the file cannot be read.
    """
    flags: dict[str, Any] = {}
    for key, value in asked.items():
        outer, inner = SHORT.get(key, (None, key))
        flags = _over(flags, {outer: {inner: value}} if outer else {inner: value})
    from_file = _read(file) if file else {}
    _check_keys(from_file, str(file))
    _check_keys(flags, "the arguments")
    if "tier" in flags:
        from_file = _less(from_file, {**_tier(from_file), "tier": from_file.get("tier")})
    if flags.get("phase_2") is False and "finetune_text" not in flags:
        from_file = {k: v for k, v in from_file.items() if k != "finetune_text"}
    if flags.get("save_huggingface") is False and "adapter" not in flags:
        from_file = {k: v for k, v in from_file.items() if k != "adapter"}
    settings: dict[str, Any] = {}
    for layer in (_tier(from_file), from_file, _tier(flags), flags):  # the higher the later
        follows: dict[str, Any] = {}
        if "seed" in layer:
            follows["calibration"] = {"seed": layer["seed"]}
        if layer.get("finetune_text"):
            follows["phase_2"] = True
        settings = _over(settings, _over(follows, layer))
    try:
        return Settings.model_validate(settings)
    except ValidationError as error:
        raise DataError(_first(error)) from error


def as_yaml(settings: Settings) -> str:
    """A recipe with every setting, as `resolve` reads it."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def pairs_of(words: list[str], of: str) -> dict[str, Any]:
    """KEY=VALUE … of a setting that holds others → key → value.

    Raises:
        DataError: a word without "=".
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise DataError(f"--{of} {word}: give KEY=VALUE, such as steps=40.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DataError(f"--{of} {word}: {value!r} is no value in YAML.") from error
    return found


def _tier(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the tier that is asked for sets; nothing where none is, or none of that name."""
    tier = given.get("tier")
    return TIERS.get(tier, {}) if isinstance(tier, str) else {}


def _less(settings: Mapping[str, Any], tier: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that have the value that a tier gives them."""
    result = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(tier.get(key), Mapping):
            result[key] = _less(value, tier[key])
        elif key not in tier or tier[key] != value:
            result[key] = value
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not YAML or JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get(RECIPE), dict):
        found = found[RECIPE]
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no settings: write KEY: VALUE lines (--print-recipe).")
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `above` over those of `below`; inside a mapping too."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _over(result[key], value) if both else value
    return result


def _check_keys(given: Mapping[str, Any], source: str) -> None:
    known: dict[str, list[str]] = {"": list(Settings.model_fields)}
    for name in NESTED:
        known[name] = [f.name for f in fields(Settings.model_fields[name].annotation)]  # type: ignore[arg-type]
    for place, names in known.items():
        inside = given.get(place, {}) if place else given
        for key in inside if isinstance(inside, Mapping) else ():
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1, 0.5)
                fix = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
                where = f"{place} has no setting" if place else "no setting is called"
                raise DataError(f"{source}: {where} {key!r}: {fix}")


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence."""
    found = error.errors()[0]
    name = ".".join(str(part) for part in found["loc"])
    reason = found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error" and not isinstance(found["input"], str | int | list):
        return f"{name}: {reason}" if name else reason
    return f"{name} is {found['input']!r}: {reason}"
