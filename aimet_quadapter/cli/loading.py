"""What `quadapter run` works on: the model, its tokenizer, and the tokens of texts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UnsupportedModelError
from .settings import EMBEDDED, Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Subject:
    """A model and the tokens that it reads.

    Attributes:
        model: the prepared model.
        hf_model: HuggingFace's, where a checkpoint is to be written; else None, for its memory.
        tokenizer: the model's.
        samples: calibration samples, each (1, T).
        finetune: batches of phase 2, each (1, T); those of `samples` without a text of their own.
        texts: name → token ids to evaluate, (N,).
        begins_with: what each window begins with.
        length: T.
        window: tokens of an evaluation window.
    """

    model: Any
    hf_model: Any
    tokenizer: Any
    samples: list[Tensor]
    finetune: list[Tensor]
    texts: dict[str, Tensor]
    begins_with: list[int]
    length: int
    window: int

    @property
    def rotated(self) -> str:
        """How the stream is turned, "none" where it is not."""
        return self.model.rotation["kind"] if self.model.rotation else "none"


def load(settings: Settings, processes: int = 1) -> Subject:
    """The prepared model and its texts.

    Args:
        settings: of the run.
        processes: how many share the batches of phase 2.

    Raises:
        DataError, UnsupportedModelError: a text, a model or a device is not what it should be.
    """
    import torch

    from ..evaluation.tokenization import first_tokens, prompt_prefix, spread_tokens
    from ..models.preparation import prepare

    _quiet_dependencies()
    torch.manual_seed(settings.seed)
    device = _device(settings.device)
    hf_model, tokenizer = model_and_tokenizer(settings.model)
    positions = getattr(hf_model.config, "max_position_embeddings", None) or 512
    length = settings.length or min(512, positions)
    first = prompt_prefix(tokenizer) if settings.bos else torch.zeros(0, dtype=torch.long)

    def rows(texts: Sequence[str], split: str, count: int, at_least: int) -> list[Tensor]:
        text = _read(texts, split, settings.text_dir)
        short = length - len(first)
        try:
            if at_least < count:  # as many as there are
                there = len(first_tokens(tokenizer, text, count * short, special=False))
                count = max(min(count, there // max(short, 1)), at_least)
            found = spread_tokens(tokenizer, text, count, short)
        except DataError as error:
            raise DataError(f"{', '.join(texts)}: {error} (samples, length)") from error
        return [torch.cat((first, row))[None].to(device) for row in found]

    samples = rows(settings.calibration_text, "validation", settings.samples, settings.samples)
    finetune = samples
    if settings.finetune_text:
        count = settings.finetuning.steps * settings.finetuning.accumulate * processes
        finetune = rows(settings.finetune_text, "train", count, 1)
    texts = {
        short: first_tokens(
            tokenizer, _read([name], "test", settings.text_dir), settings.eval_tokens, special=False
        )
        for name, short in _short_names(settings.evaluation_text).items()
    }
    return Subject(
        model=prepare(hf_model).to(device),
        hf_model=hf_model if settings.save_huggingface else None,
        tokenizer=tokenizer,
        samples=samples,
        finetune=finetune,
        texts=texts,
        begins_with=first.tolist(),
        length=length,
        window=settings.window or length,
    )


def transforms_of(settings: Settings, model: Any) -> tuple[Any, str]:
    """The prefix and the rotation that are asked for, or that the model gets by default."""
    wins = model.has_rms_norms
    return (
        settings.prefix or ("auto" if wins else "none"),
        settings.rotate or ("auto" if wins else "none"),
    )


def transform(settings: Settings, subject: Subject) -> None:
    """Keep a prefix and turn the stream, as asked for or by default.

    Behind a prefix the samples are without what the tokenizer puts first, which the prefix then
    begins with, and as much shorter as the prefix is long; so are the subject's lengths.

    Raises:
        UnsupportedModelError: a rotation is asked for and the model cannot be turned.
    """
    from ..transforms import choose_prefix, choose_rotation, rotate, set_prefix

    model = subject.model
    wanted, kind = transforms_of(settings, model)
    if wanted == "auto":
        print(choose_prefix(model, subject.tokenizer, subject.samples), flush=True)
    elif wanted != "none":
        set_prefix(model, wanted)
    if model.prefix:
        for name in ("samples", "finetune"):
            before = getattr(subject, name)
            setattr(subject, name, [behind(model.prefix, subject.begins_with, x) for x in before])
        subject.begins_with = []
        subject.length -= len(model.prefix)
        subject.window -= len(model.prefix)
        text = subject.tokenizer.decode(list(model.prefix))
        print(f"prefix {list(model.prefix)} {text!r}: do not send it again", flush=True)
    if kind == "auto":
        make_sim = partial(simulate, settings)
        try:
            print(choose_rotation(model, subject.samples, make_sim, seed=settings.seed), flush=True)
        except UnsupportedModelError as error:
            print(f"not rotated: {error}", flush=True)
    elif kind != "none":
        rotate(model, kind=kind, seed=settings.seed)


def simulate(settings: Settings, model: Any) -> Any:
    """The sim of a prepared model, with the bits asked for and no ranges."""
    from aimet_torch import QuantizationSimModel

    from ..precision.bits import set_norm_weight_bits, set_residual_bits, set_table_bits

    sim = QuantizationSimModel(
        model,
        model.dummy_input(),
        default_param_bw=settings.bits[0],
        default_output_bw=settings.bits[1],
        config_file=settings.config_file,
    )
    of_norms = settings.norm_weight_bits or max(settings.bits)
    for bits, give in (
        (settings.residual_bits, set_residual_bits),
        (settings.table_bits, set_table_bits),
        (of_norms, set_norm_weight_bits),
    ):
        if bits is not None:
            give(sim, bits)
    return sim


def behind(prefix: Sequence[int], begins_with: Sequence[int], sample: Tensor) -> Tensor:
    """A sample (1, T) as it is read behind a prefix (1, ≤ T − P).

    Raises:
        DataError: the prefix does not begin with what the tokenizer puts before every text.
    """
    first = len(begins_with)
    if sample.shape[1] <= len(prefix):
        raise DataError(
            f"a sample of {sample.shape[1]} tokens has none behind a prefix of {len(prefix)}: give "
            "longer samples, or a shorter prefix."
        )
    if list(prefix[:first]) != list(begins_with):
        raise DataError(
            f"the prefix is {list(prefix)}, and the tokenizer begins every text with "
            f"{list(begins_with)}: begin the prefix with it, or leave it out (--no-bos)."
        )
    return sample[:, first : first + sample.shape[1] - len(prefix)]


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path → as much of its end as tells it from the others."""
    parts = {path: Path(path).parts for path in paths}
    found = {}
    for path, own in parts.items():
        others = [other for name, other in parts.items() if name != path]
        count = next(n for n in range(1, len(own) + 1) if _apart(own, others, n))
        found[path] = "/".join(own[-count:]) if count < len(own) else path
    return found


def _apart(own: Sequence[str], others: Sequence[Sequence[str]], count: int) -> bool:
    return count == len(own) or all(own[-count:] != other[-count:] for other in others)


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


def model_and_tokenizer(name: str) -> tuple[Any, Any]:
    """A model by name or folder, in fp32, and its tokenizer.

    Raises:
        DataError: it is no causal language model.
    """
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


def _read(names: Sequence[str], split: str, text_dir: str | None) -> str:
    """Files, or texts by name, as one text."""
    from ..evaluation.texts import load_text, read_file

    found = []
    for name in names:
        file = Path(name)
        if file.is_file():
            found.append(read_file(file))
            continue
        try:
            found.append(load_text(name, split, text_dir))
        except DataError as error:
            raise DataError(
                f"there is no file {name}, and as the name of a text: {error}"
            ) from error
    return "\n\n".join(found)
