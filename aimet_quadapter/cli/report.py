"""`quadapter report RESULTS`: what the recipes measured, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser("report", help="write the results of recipes as one HTML page")
    parser.add_argument("results", type=Path, help="folder of result files")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="%(default)s"
    )
    parser.set_defaults(command=write_report)


def write_report(args: argparse.Namespace) -> None:
    """Write the page, and say where."""
    from ..results.page import report

    report(args.results, args.output)
    print(f"written to {args.output}")
