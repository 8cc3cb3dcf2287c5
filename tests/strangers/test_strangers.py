"""Folded checkpoints in the hands of quantizers that know nothing of Quadapter.

Their versions do not live with ours: they run in an environment of their own, made here (6 GB), or
that of the Python in STRANGERS_PYTHON. Only files go there and back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

import aimet_quadapter
from aimet_quadapter import cli

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
EMBEDDED = Path(aimet_quadapter.__file__).parent / "evaluation" / "default_model"
FOLD = {
    "w8a8": ["--bits", "8", "8", "--residual-bits", "16"],
    "w4a16": ["--bits", "4", "16"],
}
"""Scheme → the same in AIMET's words; the head and the tables stay as they are in both."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with llm-compressor, and auto-round, which it requires."""
    if given := os.environ.get("STRANGERS_PYTHON"):
        return Path(given)
    if sys.version_info < (3, 11):
        pytest.skip("llm-compressor's compressed-tensors needs Python 3.11")
    folder = tmp_path_factory.mktemp("strangers")
    venv.create(folder, with_pip=True)
    own = folder / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "--quiet", "llmcompressor"], check=True)
    return own


@pytest.fixture(scope="module", params=FOLD)
def folded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A scheme, and the embedded model with α for it."""
    folder = tmp_path_factory.mktemp(request.param) / "folded"
    quick = ["--samples", "2", "--steps", "10", "--length", "256", "--eval-tokens", "512"]
    sites = ["--table-bits", "16", "--config-file", "default"]
    assert cli.main(["fold", "-o", str(folder), *FOLD[request.param], *sites, *quick]) == 0
    return request.param, folder


def measured(python: Path, program: str, scheme: str, folder: Path, place: Path) -> dict[str, Any]:
    """What a program found in the other environment."""
    result = place / "result.json"
    texts = [f"--{n}-text={EMBEDDED / f}.txt" for n, f in TEXTS.items()]
    few = ["--samples", "2", "--length", "256", "--eval-tokens", "1024"]
    command = [python, HERE / program, folder, *texts, *few, "--scheme", scheme, "--result", result]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text(encoding="utf-8"))


TEXTS = {"calibration": "calibration", "evaluation": "heldout"}

LINEARS = 16
"""Of four layers, four each."""


@pytest.mark.parametrize("program", ["in_llmcompressor.py", "in_auto_round.py"])
def test_a_quantizer_reads_the_checkpoint_and_loses_less(
    python: Path, folded: tuple[str, Path], program: str, tmp_path: Path
) -> None:
    scheme, folder = folded
    if (program, scheme) == ("in_auto_round.py", "w8a8"):
        pytest.skip("auto-round is asked for 4-bit weights only")
    before = measured(python, program, scheme, EMBEDDED, tmp_path)
    after = measured(python, program, scheme, folder, tmp_path)
    assert before["modules"] == after["modules"] == LINEARS
    assert after["fp32"] == pytest.approx(before["fp32"], rel=1e-4)
    assert before["quantized"] > before["fp32"]
    if scheme == "w8a8":
        lost = [found["quantized"] / found["fp32"] - 1 for found in (before, after)]
        assert lost[1] < lost[0] / 4
