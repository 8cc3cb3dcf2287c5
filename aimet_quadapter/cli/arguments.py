"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A number, 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def bits(text: str) -> int:
    """A bit width that AIMET simulates."""
    if not 4 <= (value := int(text)) <= 16:
        raise argparse.ArgumentTypeError(f"{value} bits: AIMET simulates 4 to 16")
    return value


def add_export_and_target(parser: argparse.ArgumentParser) -> None:
    """The folder of an export, and the HTP that it is compiled for."""
    add = parser.add_argument
    add("folder", type=Path, help="what export wrote")
    add("--htp-arch", default="73", metavar="N", help="HTP (%(default)s)")
    add("--soc-model", type=int, metavar="N", help="chip (any with this HTP)")
