from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from aimet_quadapter import default_text, load_default, perplexity

FOLDER = Path(str(files("aimet_quadapter.evaluation"))) / "default_model"


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return load_default()


def test_the_model_is_a_gpt2_in_fp32(loaded: tuple) -> None:
    model, tokenizer = loaded
    assert isinstance(model, GPT2LMHeadModel)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) <= model.config.vocab_size


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "train_default_model.py" in card
    assert "outlier" in card.lower()


def test_the_texts_are_long_enough_and_apart(loaded: tuple) -> None:
    _, tokenizer = loaded
    calibration, heldout = default_text("calibration"), default_text("heldout")
    for text in (calibration, heldout):
        assert len(tokenizer(text, verbose=False).input_ids) >= 10 * 512
    lines, others = (
        {line for line in text.splitlines() if len(line) > 60} for text in (calibration, heldout)
    )
    assert len(lines & others) < 0.01 * len(others)  # a copyright line or two


def test_any_text_survives_the_tokenizer(loaded: tuple) -> None:
    _, tokenizer = loaded
    for text in ("def f(x):\n\treturn x ** 2", "naïve α → β", "", "\x00\N{SNOWMAN}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_model_has_learnt_its_language(loaded: tuple) -> None:
    model, tokenizer = loaded
    ids = tokenizer(default_text("heldout"), return_tensors="pt", verbose=False).input_ids
    assert perplexity(model, ids[:, :2048], 512) < 0.1 * model.config.vocab_size


def test_no_such_text() -> None:
    with pytest.raises(ValueError, match="calibration and heldout"):
        default_text("train")
