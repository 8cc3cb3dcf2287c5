"""`quadapter generate FOLDER PROMPT`: text from the graphs that `run --generation` wrote."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_export_and_target, positive


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser(
        "generate",
        help="generate text with the graphs of run --generation, on the HTP",
        description="Generate text greedily with the graphs of run --generation, on the HTP; on "
        "an x86 machine that is Qualcomm's emulation of it.",
    )
    add_export_and_target(parser)
    add = parser.add_argument
    add("prompt", help="text that goes on")
    add("--tokens", type=positive, default=64, help="at most (%(default)s)")
    add("--cpu", action="store_true", help="with ONNX Runtime on the CPU instead")
    parser.set_defaults(command=generate)


def generate(args: argparse.Namespace) -> None:
    """Print the prompt and what follows it."""
    from ..device.generator import generate_on_cpu, generate_on_htp

    if args.cpu:
        found = generate_on_cpu(args.folder, args.prompt, args.tokens)
    else:
        target = {"htp_arch": args.htp_arch, "soc_model": args.soc_model}
        found = generate_on_htp(args.folder, args.prompt, args.tokens, **target)
    print(f"{args.prompt}{found}")
