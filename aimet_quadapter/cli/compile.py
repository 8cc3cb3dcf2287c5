"""`quadapter compile FOLDER`: a context binary for Qualcomm's HTP, from an export."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_export_and_target


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser("compile", help="compile an export for Qualcomm's HTP")
    add_export_and_target(parser)
    parser.add_argument(
        "--no-check", action="store_true", help="do not run it on the reference inputs"
    )
    parser.set_defaults(command=compile_export)


def compile_export(args: argparse.Namespace) -> None:
    """Compile, and print what became of it."""
    from ..device.compilation import compile_for_htp

    target = {"htp_arch": args.htp_arch, "soc_model": args.soc_model}
    print(compile_for_htp(args.folder, **target, check=not args.no_check))
