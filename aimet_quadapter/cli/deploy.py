"""From a shell: what becomes of a folder that was exported: `quadapter compile`, `verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

EXPORTED = "export"
"""Folder that `quadapter run` exports to, in its output folder."""

QAIRT_OPSET = 22
"""Highest ONNX opset that the converter of QAIRT 2.39 reads, as its documentation says."""


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of `quadapter`."""
    build = commands.add_parser("compile", help="compile an export for Qualcomm's HTP")
    check = commands.add_parser("verify", help="check an export: exit code 0 or, on findings, 1")
    for parser in (build, check):
        parser.add_argument("folder", type=Path, help="what export wrote")
        parser.add_argument("--htp-arch", default="73", metavar="N", help="HTP (%(default)s)")
        parser.add_argument("--soc-model", type=int, metavar="N", help="chip (any with this HTP)")
    add = check.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to compare on (the folder's inputs)")
    add("--eval-tokens", type=int, default=1024, help="tokens of it to use (%(default)s)")
    add("--no-htp", action="store_true", help="leave the HTP out")
    add("--aimet-onnx", metavar="PYTHON", help="Python that has aimet-onnx ($AIMET_ONNX_PYTHON)")
    add("--min-agreement", type=float, default=0.99, help="share of tokens (%(default)s)")
    add("--max-change", type=float, default=0.01, help="of the perplexity (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the report there as well")
    build.set_defaults(command=_compile)
    check.set_defaults(command=_verify)


def write_export(
    args: argparse.Namespace, sim: Any, tokenizer: Any, text: Tensor, about: dict[str, Any]
) -> None:
    """Export what `quadapter run` made; the first window of the text is its reference."""
    from ..exporting.whole_model import export

    inputs = sim.model.dummy_input(length=args.length)
    reference = text[None, : args.length] if len(text) >= args.length else None
    target = args.output / EXPORTED
    about |= {"tokenizer": tokenizer, "reference": reference, "opset": args.opset}
    export(sim, inputs, target, strict=False, overwrite=True, **about)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    if missing := manifest["operations_without_encoding"]:
        print(f"{len(missing)} operations carry no encoding; {target}/manifest.json lists them")


def next_step(folder: Path, opset: int) -> str:
    """The command that takes an export on towards a device, on one line."""
    command = (
        f"qairt-converter --input_network {folder}/model.onnx "
        f"--quantization_overrides {folder}/model.encodings --output_path model.dlc"
    )
    if opset > QAIRT_OPSET:
        command += f"  (QAIRT 2.39 reads opset {QAIRT_OPSET}, this is {opset}: run --opset 22)"
    return f"next: {command}"


def _compile(args: argparse.Namespace) -> None:
    from ..device.compilation import compile_for_htp

    print(compile_for_htp(args.folder, htp_arch=args.htp_arch, soc_model=args.soc_model))


def _verify(args: argparse.Namespace) -> int:
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
    from transformers import AutoTokenizer

    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{args.text} is not UTF-8 text: {error}") from error
    if not (args.folder / "tokenizer_config.json").is_file():
        raise DataError(
            f"{args.folder} has no tokenizer for --text: export with tokenizer=..., or leave "
            "--text out."
        )
    tokenizer = AutoTokenizer.from_pretrained(args.folder, local_files_only=True)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: args.eval_tokens]
