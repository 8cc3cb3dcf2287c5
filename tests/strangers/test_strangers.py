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

import pytest
from aimet_torch.common import quantsim_config

from aimet_quadapter import cli

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "strangers.py"
PER_CHANNEL = Path(quantsim_config.__file__).parent / "default_config_per_channel.json"
FOLD = {
    "w8a8": ["--bits", "8", "8", "--residual-bits", "16"],
    "w4a16": ["--bits", "4", "16", "--norm-weight-bits", "16"],
}
"""Scheme → the same in AIMET's words; the head and the tables stay as they are in both."""

LINEARS = 16
"""Of four layers, four each."""


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
    sites = ["--table-bits", "16", "--config-file", str(PER_CHANNEL)]
    assert cli.main(["fold", "-o", str(folder), *FOLD[request.param], *sites, *quick]) == 0
    return request.param, folder


@pytest.mark.parametrize("quantizer", ["llm-compressor", "auto-round"])
def test_a_quantizer_reads_the_checkpoint_and_loses_less(
    python: Path, folded: tuple[str, Path], quantizer: str, tmp_path: Path
) -> None:
    scheme, folder = folded
    if (quantizer, scheme) == ("auto-round", "w8a8"):
        pytest.skip("auto-round is asked for 4-bit weights only")
    few = ["--samples", "2", "--length", "256", "--eval-tokens", "1024"]
    command = [sys.executable, BENCHMARK, "--python", python, "--original", "embedded", *few]
    command += ["--folded", folder.name, "--quantizer", quantizer, "--scheme", scheme]
    command += ["--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text(encoding="utf-8"))
    before, after = result["original"], result["folded"]
    assert before["modules"] == after["modules"] == LINEARS
    assert after["fp32"] == pytest.approx(before["fp32"], rel=1e-4)
    assert before["quantized"] > before["fp32"]
    lost = [found["quantized"] / found["fp32"] - 1 for found in (before, after)]
    assert lost[1] < lost[0] / 2
