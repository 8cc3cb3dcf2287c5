"""`quadapter verify`, as far as the shell has a part in it; what is checked: tests/device."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from aimet_quadapter import DataError, default_text, load_default
from aimet_quadapter.cli import main, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of an export the text needs: the tokenizer."""
    load_default()[1].save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def tokens_of(text: Path, folder: Path, count: int) -> torch.Tensor:
    found = verify._tokens(argparse.Namespace(text=text, folder=folder, eval_tokens=count))
    assert found is not None
    return found


def test_only_the_beginning_of_the_text_is_tokenized(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = default_text("heldout") * 12  # about 1 MB
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    given: list[int] = []
    tokenize = PreTrainedTokenizerFast.__call__

    def record(self: PreTrainedTokenizerFast, part: str, **options: object) -> object:
        given.append(len(part))
        return tokenize(self, part, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "__call__", record)
        found = tokens_of(tmp_path / "text.txt", folder, 1024)
    assert sum(given) < len(text) / 4
    whole = load_default()[1](text, verbose=False)["input_ids"]
    assert found.tolist() == whole[:1024]
    assert tokens_of(tmp_path / "text.txt", folder, 10**9).tolist() == whole


def test_a_text_needs_utf_8_and_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    binary, text = tmp_path / "binary.txt", tmp_path / "text.txt"
    binary.write_bytes(b"caf\xe9")
    text.write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match=r"binary\.txt is not UTF-8"):
        tokens_of(binary, folder, 8)
    with pytest.raises(DataError, match="has no tokenizer for --text"):
        tokens_of(text, tmp_path, 8)


def test_a_number_of_tokens_is_1_or_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "out", "--eval-tokens", "-5"])
    assert "-5 is not 1 or more" in capsys.readouterr().err
