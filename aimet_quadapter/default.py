"""The small language model that ships inside the package, and text for it."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ("calibration", "heldout")


def load_default() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded GPT-2 (fp32, eval mode) and its tokenizer; nothing is downloaded.

    It was trained by `recipes/train_default_model.py` with outlier channels in place, so that
    W8A8 does to it what it does to the real GPT-2; its card is `default_model/README.md`.

    Returns:
        The model and the tokenizer, as `transformers` loads them from a folder.

    Raises:
        OSError: the installed package lacks the model's files.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with as_file(files(__package__) / "default_model") as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def default_text(part: Literal["calibration", "heldout"]) -> str:
    """Read a text that goes with the embedded model.

    Args:
        part: "calibration" for ranges and learning, "heldout" for evaluation. The model was
            trained on neither.

    Returns:
        The text.

    Raises:
        ValueError: there is no such part.
    """
    if part not in TEXTS:
        raise ValueError(f"there is no text {part!r}; there are {' and '.join(TEXTS)}.")
    file = files(__package__) / "default_model" / f"{part}.txt"
    return file.read_text(encoding="utf-8")
