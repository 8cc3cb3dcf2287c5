"""From a shell: `quadapter run [model]` is the main job; report, compile, verify follow it."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import DataError, QuadapterError
from .deploy import EXPORTED, add_commands, next_step, write_export

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = "embedded"
PACKAGES = ("aimet-torch", "torch", "transformers", "onnx")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process when not given.

    Returns:
        The exit code: 0, 1 when `verify` has findings, or 2 when the input was wrong, which one
        line on stderr explains.
    """
    args = _parser().parse_args(argv)
    command = vars(args).pop("command")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|aimet_torch")
            return command(args) or 0
    except (QuadapterError, OSError) as error:
        print(f"quadapter: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quadapter", description=__doc__)
    parser.add_argument("--version", action="version", version=f"aimet_quadapter {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser(
        "run",
        help="quantize a language model with and without Quadapter, compare, export",
    )
    add = run.add_argument
    add("model", nargs="?", default=EMBEDDED, help="hub name or local folder (embedded model)")
    text: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "FILE"}
    add("--calibration-text", **text, help="UTF-8 files (embedded text)")
    add("--evaluation-text", **text, help="UTF-8 files (embedded text)")
    add("--bits", nargs=2, type=_bits, default=(8, 8), metavar=("W", "A"), help="W and A (8 8)")
    add("--residual-bits", type=_bits, metavar="A", help="of the residual stream (A of --bits)")
    add("--config-file", default="htp_v73", help="AIMET config, name or JSON file (%(default)s)")
    add("--samples", type=_positive, default=10, help="calibration samples (%(default)s)")
    add("--length", type=_positive, help="tokens of a sample (512, or the model's positions)")
    add("--window", type=_positive, help="tokens of an evaluation window (as --length)")
    add("--eval-tokens", type=_positive, default=8192, help="tokens to evaluate (%(default)s)")
    add("--steps", type=_positive, help="learning steps a pair (the preset's)")
    add("--preset", choices=("default", "paper"), default="default", help="(%(default)s)")
    add("--seed", type=int, default=0, help="seed of every random choice (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, … (the GPU if there is one)")
    add("--output", type=Path, default=Path("quadapter-out"), help="folder (%(default)s)")
    add("--opset", type=int, choices=(21, 22, 23), default=23, help="ONNX opset (%(default)s)")
    add("--no-export", action="store_true", help="write result.json alone")
    run.set_defaults(command=_run)
    page = commands.add_parser("report", help="write the results of recipes as one HTML page")
    page.add_argument("results", type=Path, help="folder of result files")
    page.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="%(default)s")
    page.set_defaults(command=_report)
    add_commands(commands)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _bits(text: str) -> int:
    if not 4 <= (value := int(text)) <= 16:
        raise argparse.ArgumentTypeError(f"{value} bits: AIMET simulates 4 to 16")
    return value


def _run(args: argparse.Namespace) -> None:
    """Load, measure, quantize, measure, apply Quadapter, measure, export, write result.json."""
    args.output.mkdir(parents=True, exist_ok=True)
    from ..progress import Clock

    clock = Clock()
    with clock.timed("load"):
        from ..evaluation.scores import perplexity
        from ..pipeline import apply_quadapter

        model, tokenizer, samples, evaluation = _load_all(args)
    print(_headline(args, model))
    scores: dict[str, float] = {}

    def measure(name: str, subject: Any) -> None:
        with clock.timed(f"evaluate {name}"):
            scores[name] = perplexity(subject, evaluation, args.window)
        print(f"{name:<10} {scores[name]:12.3f}", flush=True)

    measure("FP32", model)
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
            write_export(args, sim, tokenizer, evaluation, about)
    _write_result(args, scores, clock.seconds)
    if not args.no_export:
        print(next_step(args.output / EXPORTED, args.opset))


def _load_all(args: argparse.Namespace) -> tuple[Any, Any, list[Tensor], Tensor]:
    """The prepared model, its tokenizer, calibration samples, evaluation tokens."""
    import torch

    from ..artifacts.manifest import check_target
    from ..models.preparation import prepare

    _quiet_dependencies()
    if not args.no_export:
        check_target(args.output / EXPORTED, overwrite=True)
    torch.manual_seed(args.seed)
    device = _device(args.device)
    hf_model, tokenizer = _load(args.model)
    positions = getattr(hf_model.config, "max_position_embeddings", None) or 512
    args.length = args.length or min(512, positions)
    args.window = args.window or args.length
    samples, evaluation = _tokens(args, tokenizer)
    model = prepare(hf_model).to(device)
    return model, tokenizer, [sample.to(device) for sample in samples], evaluation


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


def _report(args: argparse.Namespace) -> None:
    from ..results.page import report

    report(args.results, args.output)
    print(f"written to {args.output}")


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {name}: torch sees no GPU. Use --device cpu.")
    return device


def _load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer, in fp32."""
    if name == EMBEDDED:
        from ..evaluation.embedded import load_default

        return load_default()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except ValueError as error:
        raise DataError(f"{name} does not load as a causal language model: {error}") from error
    return model.eval(), tokenizer


def _tokens(args: argparse.Namespace, tokenizer: Any) -> tuple[list[Tensor], Tensor]:
    """Calibration samples, each (1, length), and the evaluation tokens (N,)."""
    calibration = _tokenize(tokenizer, args.calibration_text, "calibration")
    needed = args.samples * args.length
    if len(calibration) < needed:
        raise DataError(
            f"the calibration text has {len(calibration)} tokens; {args.samples} samples of "
            f"{args.length} need {needed}. Give more text, or lower --samples or --length."
        )
    evaluation = _tokenize(tokenizer, args.evaluation_text, "heldout")[: args.eval_tokens]
    return list(calibration[:needed].reshape(args.samples, 1, args.length)), evaluation


def _tokenize(tokenizer: Any, files: Sequence[Path] | None, embedded: Any) -> Tensor:
    from ..evaluation.embedded import default_text

    text = "\n\n".join(_read(file) for file in files) if files else default_text(embedded)
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _calibration(args: argparse.Namespace) -> Any:
    from ..config import CalibrationConfig

    changes = {"seed": args.seed} | ({"steps": args.steps} if args.steps else {})
    return (
        CalibrationConfig.paper(**changes)
        if args.preset == "paper"
        else CalibrationConfig(**changes)
    )


def _headline(args: argparse.Namespace, model: Any) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    weights, activations = args.bits
    residual = f", residual stream A{args.residual_bits}" if args.residual_bits else ""
    return "\n".join(
        [
            " · ".join(f"{name} {number}" for name, number in _versions().items()),
            f"model        {args.model}: {model.hf_class}, {parameters:.1f} M parameters",
            f"quantizers   W{weights}A{activations}{residual}, AIMET config {args.config_file}",
            f"calibration  {args.samples} × {args.length} tokens, preset {args.preset}, "
            f"seed {args.seed}",
            f"evaluation   {args.eval_tokens} tokens, windows of {args.window}",
            "",
            f"{'':<10} {'perplexity':>12}",
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


def _quiet_dependencies() -> None:
    from aimet_torch.common.utils import AimetLogger
    from transformers.utils import logging as transformers_logging

    AimetLogger.set_level_for_all_areas(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
