"""Write docs/settings.md: every setting of `quadapter run`, read from the code itself.

    python docs/write_settings.py

The texts are the descriptions of the settings and the docstrings of the two config classes.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from aimet_quadapter import CalibrationConfig, FinetuneConfig
from aimet_quadapter.cli.settings import SHORT, TIERS, Settings

PAGE = Path(__file__).with_name("settings.md")

HEAD = """# Settings of `quadapter run`

Each is a key of a recipe's file and a flag: `eval_tokens: 4096` in YAML is `--eval-tokens 4096`
in a shell, `bos: false` is `--no-bos`. A flag lies over the file, the file over what its tier sets,
the tier over the defaults; `--tier` lies over the file too. An unknown key or a wrong value is
refused before any work.

```bash
quadapter run ./my-llama --bits 4 16 --table-bits 8 --print-recipe   # all settings, as a file
quadapter run --recipe recipe.yaml --seed 1
quadapter run --recipe quadapter-out/result.json   # the same run again, with what it chose
```

An interrupted run goes on when it is given the same settings and `output` again: phase 1, the
choice of α and phase 2 from `checkpoints` in there, the rest from its start.
`docs/write_settings.py` writes this page from the code.
"""


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of a table of keys, defaults and meanings."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    return lines + [f"| `{k}` | {d} | {m} |" for k, d, m in rows]


def value(x: Any) -> str:
    """A default as YAML has it."""
    if x is None:
        return ""
    if isinstance(x, bool):
        return str(x).lower()
    if isinstance(x, list | tuple):
        return f"`[{', '.join(map(str, x))}]`"
    return f"`{x}`"


def described(config: type) -> list[tuple[str, str, str]]:
    """Fields of a config class with what its docstring says."""
    found = re.search(r"Attributes:\n(.*?)\n\n", f"{config.__doc__}\n\n", re.S)
    assert found is not None
    texts = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", textwrap.dedent(found[1]), re.S | re.M))
    rows = []
    for field in fields(config):
        rows.append((field.name, value(field.default), " ".join(texts[field.name].split())))
    return rows


def page() -> str:
    """The whole page."""
    rows = []
    for name, field in Settings.model_fields.items():
        nested = is_dataclass(field.annotation)
        default = "below" if nested else value(field.default)
        rows.append((name, default, str(field.description)))
    lines = [HEAD, *table(rows), ""]
    short = ", ".join(f"`--{k.replace('_', '-')}` for `{o}.{i}`" for k, (o, i) in SHORT.items())
    lines += [f"Short flags: {short}; others as `--calibration lr=0.1 choice=layer`.", ""]
    lines += ["## `tier`", "", "What each sets otherwise than the defaults:", ""]
    lines += ["| tier | settings |", "| --- | --- |"]
    for tier, settings in TIERS.items():
        lines.append(f"| `{tier}` | {said(settings)} |")
    lines.append("")
    for name, config in (("calibration", CalibrationConfig), ("finetuning", FinetuneConfig)):
        lines += [f"## `{name}`", "", f"`{config.__name__}`:", "", *table(described(config)), ""]
    return "\n".join(lines)


def said(settings: dict[str, Any]) -> str:
    """The settings of a tier on a line."""
    cells = []
    for key, of in settings.items():
        if isinstance(of, dict) and len(of) > 2:
            cells.append(f"`{key}` as the paper has it")
        elif isinstance(of, dict):
            cells += [f"`{key}.{inner}: {x}`" for inner, x in of.items()]
        else:
            cells.append(f"`{key}: {str(of).lower() if isinstance(of, bool) else of}`")
    return ", ".join(cells) or "nothing"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
