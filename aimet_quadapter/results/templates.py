"""The package's data files, and pages made of templates among them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def data(name: str) -> str:
    """A data file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: name of the data file; it may include others.
        values: what its names stand for; all that it uses.
    """
    environment = Environment(
        loader=FunctionLoader(data),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def flat(part: Mapping[str, Any], head: str = "") -> Iterable[tuple[str, str]]:
    """Key → value as text, of mappings inside as well: `outer.inner`."""
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{head}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{head}{name}", text
