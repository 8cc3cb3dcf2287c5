"""Every `quadapter` command of docs/phone.md, one after the other, on a small Llama."""

import re
import shlex
from pathlib import Path

import pytest
from tiny import llama, saved
from transformers import GenerationConfig

from aimet_quadapter import load_default
from aimet_quadapter.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "phone.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = (
    "--samples 2 --steps 2 --eval-tokens 128 --length 64 --calibration-text built-in "
    "--evaluation-text built-in"
)
"""Behind the page's own options of `run`, over which they lie."""


def commands() -> list[list[str]]:
    """Arguments of each command of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("quadapter ")]


def test_the_page_from_a_model_to_a_phone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    _, tokenizer = load_default()
    model = llama(2, vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config = GenerationConfig()
    saved(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    ran = []
    for arguments in commands():
        given = ["model" if a == MODEL else a for a in arguments]
        if given[0] == "run":
            given += SMALL.split()
        code = main(given)
        said = capsys.readouterr()
        # Of a random model some of its tokens are another's on the HTP: a finding, not an error.
        assert code in ((0, 1) if given[0] == "verify" else (0,)), said.err
        ran.append(given[0])
    assert {"run", "verify", "compile", "generate"} <= set(ran)
