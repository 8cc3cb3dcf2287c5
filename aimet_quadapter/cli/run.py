"""`quadapter run [MODEL]`: quantize with and without Quadapter, compare, export."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import ROTATIONS
from .arguments import bits, positive
from .loading import EMBEDDED, load, transform

if TYPE_CHECKING:
    from torch import Tensor

WINS = "for models with RMSNorm, but for --preset paper"
"""Where a prefix and a rotation are measured to win at 8 bits, and so are the default."""

PACKAGES = ("aimet-torch", "torch", "transformers", "onnx")

EXPORTED = "export"
"""Folder that `quadapter run` exports to, in its output folder."""

QAIRT_OPSET = 22
"""Highest ONNX opset that the converter of QAIRT 2.39 reads, as its documentation says."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser(
        "run",
        help="quantize a language model with and without Quadapter, compare, export",
    )
    add = parser.add_argument
    add("model", nargs="?", default=EMBEDDED, help="hub name or local folder (embedded model)")
    text: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "FILE"}
    add("--calibration-text", **text, help="UTF-8 files (embedded text)")
    add("--evaluation-text", **text, help="UTF-8 files (embedded text)")
    add("--bits", nargs=2, type=bits, default=(8, 8), metavar=("W", "A"), help="W and A (8 8)")
    add("--residual-bits", type=bits, metavar="A", help="of the residual stream (A of --bits)")
    add("--config-file", default="htp_v73", help="AIMET config, name or JSON file (%(default)s)")
    add(
        "--prefix", nargs="+", metavar="ID", help=f"tokens before every text, or none (auto {WINS})"
    )
    rotations = (*ROTATIONS, "none")
    wins = f"turn the residual stream (hadamard {WINS}, where possible)"
    add("--rotate", nargs="?", const="hadamard", choices=rotations, help=wins)
    add("--samples", type=positive, default=10, help="calibration samples (%(default)s)")
    add("--length", type=positive, help="tokens of a sample (512, or the model's positions)")
    add("--window", type=positive, help="tokens of an evaluation window (as --length)")
    add("--eval-tokens", type=positive, default=8192, help="tokens to evaluate (%(default)s)")
    add("--no-bos", action="store_true", help="windows without the tokenizer's BOS")
    add("--steps", type=positive, help="learning steps a layer or a block (the preset's)")
    add("--preset", choices=("default", "paper"), default="default", help="(%(default)s)")
    add("--seed", type=int, default=0, help="seed of every random choice (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, … (the GPU if there is one)")
    add("--output", type=Path, default=Path("quadapter-out"), help="folder (%(default)s)")
    add("--opset", type=int, choices=(21, 22, 23), default=23, help="ONNX opset (%(default)s)")
    add("--no-export", action="store_true", help="write result.json alone")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Load, measure, quantize, measure, apply Quadapter, measure, export, write result.json."""
    args.output.mkdir(parents=True, exist_ok=True)
    from ..progress import Clock

    clock = Clock()
    with clock.timed("load"):
        from ..artifacts.manifest import check_target
        from ..evaluation.scores import perplexity
        from ..pipeline import apply_quadapter

        if not args.no_export:
            check_target(args.output / EXPORTED, overwrite=True)
        model, tokenizer, samples, evaluation = load(args)
    print(_headline(args, model, tokenizer))
    scores: dict[str, float] = {}

    def measure(name: str, subject: Any) -> None:
        with clock.timed(f"evaluate {name}"):
            scores[name] = perplexity(subject, evaluation, args.window, prefix=args.begins_with)
        print(f"{name:<12} {scores[name]:12.3f}", flush=True)

    measure("FP32", model)
    with clock.timed("prefix and rotation"):
        samples = transform(args, model, tokenizer, samples)
    if model.prefix:
        measure("FP32, prefix", model)
    with clock.timed("quantize"):
        sim = _quantize(args, model, samples)
    measure("PTQ", sim)
    with clock.timed("quadapter"):
        result = apply_quadapter(sim, samples, calibration=_calibration(args))
    measure("Quadapter", sim)
    print(f"\n{result}\n")
    if not args.no_export:
        with clock.timed("export"):
            names = [pair.name for pair in result.pairs]
            about = {"perplexities": scores, "pairs": names}
            _export(args, sim, tokenizer, evaluation, about)
    args.prefix = list(model.prefix)
    _write_result(args, scores, clock.seconds)
    if not args.no_export:
        print(next_step(args.output / EXPORTED, args.opset))


def _quantize(args: argparse.Namespace, model: Any, samples: list[Tensor]) -> Any:
    """The sim with ranges from the samples, as AIMET makes it."""
    from aimet_torch import QuantizationSimModel

    from ..precision.bits import set_residual_bits

    sim = QuantizationSimModel(
        model,
        model.dummy_input(),
        default_param_bw=args.bits[0],
        default_output_bw=args.bits[1],
        config_file=args.config_file,
    )
    if args.residual_bits:
        set_residual_bits(sim, args.residual_bits)
    sim.compute_encodings(lambda quantized: [quantized(sample) for sample in samples])
    return sim


def _export(
    args: argparse.Namespace, sim: Any, tokenizer: Any, text: Tensor, about: dict[str, Any]
) -> None:
    """Export the sim; the first window of the text is its reference."""
    import torch

    from ..exporting.whole_model import export

    inputs = sim.model.dummy_input(length=args.length)
    begin = text.new_tensor(args.begins_with)
    length = args.length - len(begin)
    window = torch.cat((begin, text[:length]))[None]
    reference = window if len(text) >= length else None
    target = args.output / EXPORTED
    about |= {"tokenizer": tokenizer, "reference": reference, "opset": args.opset}
    export(sim, inputs, target, strict=False, overwrite=True, **about)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    if missing := manifest["operations_without_encoding"]:
        print(f"{len(missing)} operations carry no encoding; {target}/manifest.json lists them")


def next_step(folder: Path, opset: int) -> str:
    """The command that takes an export on towards a device, on one line."""
    model, encodings = (shlex.quote(str(folder / f"model.{end}")) for end in ("onnx", "encodings"))
    command = (
        f"qairt-converter --input_network {model} --quantization_overrides {encodings} "
        "--output_path model.dlc"
    )
    if opset > QAIRT_OPSET:
        command += f"  (QAIRT 2.39 reads opset {QAIRT_OPSET}, this is {opset}: run --opset 22)"
    return f"next: {command}"


def _calibration(args: argparse.Namespace) -> Any:
    from ..config import CalibrationConfig

    changes = {"seed": args.seed} | ({"steps": args.steps} if args.steps else {})
    return (
        CalibrationConfig.paper(**changes)
        if args.preset == "paper"
        else CalibrationConfig(**changes)
    )


def _headline(args: argparse.Namespace, model: Any, tokenizer: Any) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    weights, activations = args.bits
    residual = f", residual stream A{args.residual_bits}" if args.residual_bits else ""
    first = args.begins_with
    return "\n".join(
        [
            " · ".join(f"{name} {number}" for name, number in _versions().items()),
            f"model        {args.model}: {model.hf_class}, {parameters:.1f} M parameters",
            f"quantizers   W{weights}A{activations}{residual}, AIMET config {args.config_file}",
            f"calibration  {args.samples} × {args.length} tokens, preset {args.preset}, "
            f"seed {args.seed}",
            f"evaluation   {args.eval_tokens} tokens, windows of {args.window}"
            + (f"; all begin with {tokenizer.decode(first)}" if first else ""),
            "",
            f"{'':<12} {'perplexity':>12}",
        ]
    )


def _versions() -> dict[str, str]:
    numbers = {name: version(name) for name in PACKAGES}
    return {"aimet_quadapter": __version__, **numbers, "python": platform.python_version()}


def _write_result(
    args: argparse.Namespace, scores: dict[str, float], seconds: dict[str, float]
) -> None:
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    record = {
        "settings": settings,
        "calibration": asdict(_calibration(args)),
        "perplexity": scores,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "versions": _versions(),
        "machine": platform.platform(),
    }
    file = args.output / "result.json"
    file.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    print(f"{stages}\nwritten to {args.output}")
