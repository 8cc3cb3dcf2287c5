"""Windows begin as prompts do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, gpt2, tokens
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from aimet_quadapter import (
    DataError,
    calibration_samples,
    load_default,
    perplexity,
    prepare,
    prompt_prefix,
)
from aimet_quadapter.cli import main


@pytest.fixture(scope="module")
def with_bos() -> Any:
    """The embedded tokenizer with a rule like Llama's: BOS before every text."""
    _, tokenizer = load_default()
    begin = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(with_bos: Any) -> None:
    assert prompt_prefix(with_bos).tolist() == [with_bos.eos_token_id]
    assert prompt_prefix(load_default()[1]).tolist() == []


def test_every_sample_begins_with_the_prefix() -> None:
    ids, prefix = torch.arange(100), torch.tensor([7, 8])
    samples = calibration_samples(ids, 4, 10, seed=0, prefix=prefix)
    assert {tuple(s.shape) for s in samples} == {(1, 10)}
    assert all(s[0, :2].tolist() == [7, 8] for s in samples)
    plain = calibration_samples(ids, 4, 8, seed=0)
    assert all(torch.equal(s[:, 2:], p) for s, p in zip(samples, plain, strict=True))


def test_the_same_tokens_are_scored_behind_the_prefix() -> None:
    model = prepare(gpt2())
    ids, begin = tokens(1, 20)[0], [3]
    expected = 0.0
    for start in (0, 10):
        rows = torch.cat((torch.tensor(begin), ids[start : start + 10]))[None]
        with torch.no_grad():
            logp = model(rows)[0].log_softmax(-1)
        expected -= float(logp[1:-1].gather(1, rows[0, 2:, None]).sum())
    found = perplexity(model, ids, window=11, prefix=begin, progress=False)
    assert_close(found, math.exp(expected / 18), rtol=1e-5, atol=0)


def test_a_prefix_that_the_model_cannot_take_is_refused() -> None:
    model = prepare(gpt2())
    with pytest.raises(DataError, match=rf"the prefix is \[{VOCAB}\]; the model knows 0"):
        perplexity(model, tokens(1, 20), prefix=[VOCAB])
    with pytest.raises(DataError, match="window is -1 behind a prefix of 3"):
        perplexity(model, tokens(1, 20), window=2, prefix=[1, 2, 3])


def test_the_shell_says_what_windows_begin_with(
    with_bos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_default()
    model.save_pretrained(tmp_path / "model")
    with_bos.save_pretrained(tmp_path / "model")
    common = ["--steps", "1", "--samples", "2", "--length", "16", "--eval-tokens", "64"]
    command = ["run", str(tmp_path / "model"), *common, "--no-export", "--output", str(tmp_path)]
    assert main(command) == 0
    assert f"all begin with {with_bos.eos_token}" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["windows_begin_with"] == [with_bos.eos_token_id]
    assert main([*command, "--no-bos"]) == 0
    assert "all begin with" not in capsys.readouterr().out
