"""What `verify` says: its checks line by line, and the numbers behind them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One line of the report; `ok` is None when it was not made, `detail` then says why."""

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FINDING", None: "skipped"}[self.ok]
        return f"{mark:<8} {self.name:<22} {self.detail}"


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: the export.
        checks: in the order they were made.
        numbers: what was measured, by name.
    """

    folder: Path
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        """Append a check."""
        self.checks.append(Check(name, ok, detail))

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.findings

    @property
    def findings(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.ok is False]

    def to_json(self) -> str:
        """The report as JSON."""
        whole = {"folder": str(self.folder), "ok": self.ok}
        return json.dumps(
            {**whole, "checks": [asdict(c) for c in self.checks], "numbers": self.numbers}, indent=2
        )

    def __str__(self) -> str:
        count = len(self.findings)
        end = f"{count} finding{'s' * (count > 1)}" if count else "no findings"
        return "\n".join([*map(str, self.checks), end])
