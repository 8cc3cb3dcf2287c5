"""What `quadapter run` works on: the model, its tokenizer, and the tokens of texts."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = "embedded"
"""Name of the model inside the package."""


def load(args: argparse.Namespace) -> tuple[Any, Any, list[Tensor], Tensor]:
    """The prepared model, its tokenizer, calibration samples, evaluation tokens."""
    import torch

    from ..models.preparation import prepare

    _quiet_dependencies()
    torch.manual_seed(args.seed)
    device = _device(args.device)
    hf_model, tokenizer = _model(args.model)
    positions = getattr(hf_model.config, "max_position_embeddings", None) or 512
    args.length = args.length or min(512, positions)
    args.window = args.window or args.length
    samples, evaluation = _tokens(args, tokenizer)
    model = prepare(hf_model).to(device)
    return model, tokenizer, [sample.to(device) for sample in samples], evaluation


def transform(
    args: argparse.Namespace, model: Any, tokenizer: Any, samples: list[Tensor]
) -> list[Tensor]:
    """Keep a prefix and turn the stream, as asked for or by default; `args.rotate` says which.

    Returns:
        The samples behind the prefix: without what the tokenizer puts first, which the prefix then
        begins with, and as much shorter as the prefix is long. So are `args.length` and
        `args.window`.
    """
    from ..transforms import choose_prefix, rotate, set_prefix

    wins = args.preset != "paper" and model.has_rms_norms
    wanted = args.prefix or ["auto" if wins else "none"]
    if wanted == ["auto"]:
        print(choose_prefix(model, tokenizer, samples), flush=True)
    elif wanted != ["none"]:
        set_prefix(model, [_token(token) for token in wanted])
    if model.prefix:
        samples = [behind(model.prefix, args.begins_with, sample) for sample in samples]
        args.begins_with = []
        args.length, args.window = (n - len(model.prefix) for n in (args.length, args.window))
        text = tokenizer.decode(list(model.prefix))
        print(f"prefix {list(model.prefix)} {text!r}: do not send it again", flush=True)
    kind = args.rotate or ("hadamard" if wins else "none")
    if kind != "none":
        try:
            rotate(model, kind=kind, seed=args.seed)
        except UnsupportedModelError as e:
            if args.rotate:
                raise
            print(f"not rotated: {e}", flush=True)
            kind = "none"
    args.rotate = kind
    return samples


def behind(prefix: Sequence[int], begins_with: Sequence[int], sample: Tensor) -> Tensor:
    """A sample (1, T) as it is read behind a prefix (1, ≤ T − P).

    Raises:
        DataError: the prefix does not begin with what the tokenizer puts before every text.
    """
    first = len(begins_with)
    if list(prefix[:first]) != list(begins_with):
        raise DataError(
            f"the prefix is {list(prefix)}, and the tokenizer begins every text with "
            f"{list(begins_with)}: begin the prefix with it, or leave it out (--no-bos)."
        )
    return sample[:, first : first + sample.shape[1] - len(prefix)]


def _token(text: str) -> int:
    if not text.isdecimal():
        raise DataError(f"--prefix {text}: pass token ids, or auto or none alone.")
    return int(text)


def _quiet_dependencies() -> None:
    from aimet_torch.common.utils import AimetLogger
    from transformers.utils import logging as transformers_logging

    AimetLogger.set_level_for_all_areas(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {name}: torch sees no GPU. Use --device cpu.")
    return device


def _model(name: str) -> tuple[Any, Any]:
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
    """Calibration samples, each (1, length), and the evaluation tokens (N,).

    Sets `args.begins_with`, what each window of a text begins with.
    """
    import torch

    from ..evaluation.tokenization import first_tokens, prompt_prefix, spread_tokens

    prefix = torch.zeros(0, dtype=torch.long) if args.no_bos else prompt_prefix(tokenizer)
    args.begins_with = prefix.tolist()
    text = _text(args.calibration_text, "calibration")
    try:
        rows = spread_tokens(tokenizer, text, args.samples, args.length - len(prefix))
    except DataError as error:
        raise DataError(f"calibration: {error} (--samples, --length)") from error
    samples = [torch.cat((prefix, row))[None] for row in rows]
    text = _text(args.evaluation_text, "heldout")
    return samples, first_tokens(tokenizer, text, args.eval_tokens, special=False)


def _text(files: Sequence[Path] | None, embedded: Any) -> str:
    """The text of the files, or the embedded one."""
    from ..evaluation.embedded import default_text
    from ..evaluation.texts import read_file

    return "\n\n".join(map(read_file, files)) if files else default_text(embedded)
