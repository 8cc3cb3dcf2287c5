"""`quadapter fold MODEL -o FOLDER`: a HuggingFace checkpoint with α folded in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_settings, settings_of, take_preflight
from .run import Run

DECIDED = ("output", "export", "opset", "generation", "save_huggingface")
"""Settings of a run that the command itself decides."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser(
        "fold",
        help="write a HuggingFace checkpoint of the original class with α folded in",
        description="Learn α for the quantizers asked for and write a HuggingFace checkpoint of "
        "the original class: for any other quantizer of HuggingFace models. FOLDER.run holds "
        "result.json, report.html and what an interrupted run goes on from; FOLDER.adapters the "
        "LoRA adapters of --adapter, as they fit the checkpoint.",
    )
    parser.add_argument("-o", "--output", dest="folder", type=Path, required=True, metavar="FOLDER")
    add_settings(parser, *DECIDED)
    parser.set_defaults(command=fold)


def fold(args: argparse.Namespace) -> None:
    """A run that exports nothing but the checkpoint."""
    folder = args.__dict__.pop("folder").expanduser().resolve()
    ahead = take_preflight(args)
    output = folder.with_name(f"{folder.name}.run")
    if settings := settings_of(args, output=str(output), export=False, save_huggingface=True):
        Run(settings, checkpoint=folder, ahead=ahead).go()
