"""The small language model that ships inside the package, and text for it."""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ("calibration", "heldout")

CODE = {
    "calibration": (
        "argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "difflib", "enum",
        "fractions", "functools", "gzip", "inspect", "mailbox", "optparse", "plistlib", "pprint",
        "shutil", "smtplib", "statistics", "string", "typing",
    ),
    "heldout": ("shlex", "tarfile", "tempfile", "textwrap", "threading", "traceback", "uuid"),
}  # fmt: skip
"""Modules of the standard library whose code is a text unlike what the model was trained on."""


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


def default_code(part: Literal["calibration", "heldout"]) -> str:
    """Read Python code that the embedded model was not trained on, for what is out of its way.

    Sources of modules of the running Python's standard library, without comments and docstrings,
    which the model did see. The text differs a little between Python versions.

    Args:
        part: "calibration" for learning, "heldout" for evaluation; of different modules.

    Returns:
        The code.

    Raises:
        ValueError: there is no such part.
    """
    if part not in CODE:
        raise ValueError(f"there is no code {part!r}; there is {' and '.join(CODE)}.")
    return "\n\n".join(_code_of(name) for name in CODE[part])


def _code_of(module: str) -> str:
    """A module's source without comments and docstrings."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
