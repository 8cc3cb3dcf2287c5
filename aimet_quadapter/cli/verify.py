"""`quadapter verify FOLDER`: whether an export computes what was simulated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .arguments import add_export_and_target, positive

if TYPE_CHECKING:
    from torch import Tensor


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser("verify", help="check an export: exit code 0 or, on findings, 1")
    add_export_and_target(parser)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to compare on (the folder's inputs)")
    add("--eval-tokens", type=positive, default=1024, help="tokens of it to use (%(default)s)")
    add("--no-htp", action="store_true", help="leave the HTP out")
    add("--aimet-onnx", metavar="PYTHON", help="Python that has aimet-onnx ($AIMET_ONNX_PYTHON)")
    add("--min-agreement", type=float, default=0.99, help="share of tokens (%(default)s)")
    add("--max-change", type=float, default=0.01, help="of the perplexity (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.set_defaults(command=verify_export)


def verify_export(args: argparse.Namespace) -> int:
    """Print the report; 1 when it has findings."""
    from ..device.verification import verify

    report = verify(
        args.folder,
        _tokens(args),
        htp=not args.no_htp,
        htp_arch=args.htp_arch,
        soc_model=args.soc_model,
        aimet_onnx=args.aimet_onnx,
        min_agreement=args.min_agreement,
        max_change=args.max_change,
    )
    print(report)
    if args.json:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return 0 if report.ok else 1


def _tokens(args: argparse.Namespace) -> Tensor | None:
    """Tokens of --text, by the tokenizer in the folder; None without --text."""
    if args.text is None:
        return None
    from ..artifacts.manifest import tokenizer_in
    from ..evaluation.texts import read_file
    from ..evaluation.tokenization import first_tokens

    text = read_file(args.text)
    tokenizer = tokenizer_in(args.folder)
    if tokenizer is None:
        raise DataError(
            f"{args.folder} has no tokenizer for --text: export with tokenizer=..., or leave "
            "--text out."
        )
    return first_tokens(tokenizer, text, args.eval_tokens)
