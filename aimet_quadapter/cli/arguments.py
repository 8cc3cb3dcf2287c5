"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from .settings import NESTED, SHORT, Settings, as_yaml, pairs_of, resolve

TWO_VALUES = {"bits": ("W", "A"), "generation": ("PROMPT", "CACHE")}
"""Settings of two values → what the help calls them."""

WORDS = {"adapter": "FOLDER"}
"""Settings of several values → what the help calls one, where it is no FILE and no ID."""

REPEATED = {"adapter"}
"""Settings whose flag may be given several times."""


class Ahead(NamedTuple):
    """What is done before the work of a run.

    Attributes:
        estimate: say what it will take.
        stop: and leave it at that; nothing is written.
    """

    estimate: bool = True
    stop: bool = False


def positive(text: str) -> int:
    """A number, 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def add_export_and_target(parser: argparse.ArgumentParser) -> None:
    """The folder of an export, and the HTP that it is compiled for."""
    add = parser.add_argument
    add("folder", type=Path, help="what was exported")
    add("--htp-arch", default="73", metavar="N", help="HTP (%(default)s)")
    add("--soc-model", type=int, metavar="N", help="chip (any with this HTP)")


def settings_of(args: argparse.Namespace, **fixed: Any) -> Settings | None:
    """The settings that a command was given, or None where it was to print them.

    Args:
        args: what the parser found, `add_settings` having made it.
        fixed: settings that the command itself decides.
    """
    asked = vars(args) | fixed
    file, only_print = asked.pop("recipe"), asked.pop("print_recipe")
    for name in NESTED & asked.keys():
        asked[name] = pairs_of(asked[name], name)
    settings = resolve(asked, file)
    if only_print:
        print(as_yaml(settings), end="")
        return None
    return settings


def add_settings(parser: argparse.ArgumentParser, *without: str) -> None:
    """A flag for each setting of a run; what is not given is not in the namespace.

    Args:
        parser: of the command.
        without: settings that have none.
    """
    add = parser.add_argument
    add("--recipe", type=Path, metavar="FILE", help="settings, YAML, or a run's result.json")
    add("--print-recipe", action="store_true", help="print all settings as a recipe, and stop")
    add_preflight(parser)
    for name, field in Settings.model_fields.items():
        if name in without:
            continue
        flag = f"--{name.replace('_', '-')}"
        text = f"{field.description}{_default(field.default)}"
        given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        kinds = [_bare(k) for k in get_args(field.annotation) or () if k is not NoneType]
        if name == "model":
            parser.add_argument(name, nargs="?", **given)
        elif field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **given)
        elif is_dataclass(field.annotation):
            parser.add_argument(flag, nargs="+", metavar="KEY=VALUE", **given)
        elif name in TWO_VALUES:
            parser.add_argument(flag, nargs=2, metavar=TWO_VALUES[name], **given)
        elif any(get_origin(k) is list for k in (field.annotation, *kinds)):
            words = "FILE" if name.endswith("_text") else WORDS.get(name, "ID")
            action = "extend" if name in REPEATED else "store"
            parser.add_argument(flag, nargs="+", metavar=words, action=action, **given)
        else:
            extra = field.json_schema_extra
            if isinstance(extra, dict):
                given |= {"nargs": "?", "const": extra["const"]}
            literal = next(
                (k for k in (field.annotation, *kinds) if get_origin(k) is Literal), None
            )
            if literal is not None:
                parser.add_argument(
                    flag, metavar="{" + ",".join(map(str, get_args(literal))) + "}", **given
                )
            else:
                parser.add_argument(flag, metavar=name.rpartition("_")[2].upper(), **given)
    for short, (outer, inner) in SHORT.items():
        flag = f"--{short.replace('_', '-')}"
        text = f"short for --{outer} {inner}=…"
        parser.add_argument(flag, metavar=inner.upper(), default=argparse.SUPPRESS, help=text)


def add_preflight(parser: argparse.ArgumentParser) -> None:
    """What is done before the work: an estimate, that alone, or nothing."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--dry-run",
        action="store_true",
        help="say what it would take (time, memory, disk) and stop; nothing is written",
    )
    either.add_argument(
        "--no-preflight",
        action="store_true",
        help="estimate nothing before the work, and refuse nothing for want of memory or disk",
    )


def take_preflight(args: argparse.Namespace) -> Ahead:
    """What `add_preflight` gave, taken out of the arguments."""
    given = vars(args)
    return Ahead(not given.pop("no_preflight"), given.pop("dry_run"))


def _bare(kind: Any) -> Any:
    """A type without what it is annotated with."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _default(value: Any) -> str:
    """What the help says of a default; nothing where the description does or it holds others."""
    if value is None or isinstance(value, bool) or is_dataclass(value):
        return ""
    words = value if isinstance(value, list | tuple) else [value]
    return f" ({' '.join(map(str, words))})"
