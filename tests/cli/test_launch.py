"""`quadapter run` on two ranks that torchrun starts, beside one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import llama, saved

from aimet_quadapter import DataError, load_default
from aimet_quadapter.cli import launch, main

QUICK = ["--samples", "4", "--length", "32", "--eval-tokens", "128", "--steps", "2", "--no-export"]
QUICK += ["--prefix", "none", "--rotate", "none", "--no-report", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with the embedded model's tokenizer."""
    vocabulary = len(load_default()[1])
    tiny = llama(vocab_size=vocabulary, max_position_embeddings=512)
    return saved(tiny, tmp_path_factory.mktemp("llama"))


def on_two_ranks(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, "-m", "aimet_quadapter", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def test_two_ranks_have_the_result_of_one(model: Path, tmp_path: Path) -> None:
    """To the bit before phase 2, whose steps are on both ranks' batches: twice as many on one."""
    outputs = [tmp_path / "one", tmp_path / "two"]
    tuning = ["--finetune-text", "built-in", "--finetune-steps", "2"]
    one, two = ([str(model), *QUICK, *tuning, "--output", str(output)] for output in outputs)
    assert main(["run", *one, "--no-preflight", "--finetuning", "accumulate=2"]) == 0
    done = on_two_ranks(tmp_path, *two)
    assert done.returncode == 0, done.stderr
    expected, found = (
        json.loads((output / "result.json").read_text(encoding="utf-8"))["perplexity"]
        for output in outputs
    )
    last = "Quadapter + phase 2"
    assert found[last] != found["Quadapter"]
    assert found.pop(last)["built-in"] == pytest.approx(expected.pop(last)["built-in"], rel=1e-4)
    assert found == expected
    for line in ("FP32  ", "PTQ  ", "Quadapter  ", "time         about", "written to"):
        assert done.stdout.count(f"\n{line}") == 1, line
    assert done.stderr.count("calibrating pairs: 0/") == 1


def test_the_first_rank_says_what_is_wrong(model: Path, tmp_path: Path) -> None:
    done = on_two_ranks(tmp_path, str(model), *QUICK, "--evaluation-text", "nowhere.txt")
    assert done.returncode
    assert done.stderr.count("quadapter: error: there is no file nowhere.txt") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    with pytest.raises(DataError, match=r"process 2 of this machine has no GPU .* there are 2"):
        launch._take_gpu("cuda")
    launch._take_gpu("cuda:0")
    launch._take_gpu("cpu")
    assert taken == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch._take_gpu(None)
    assert taken == [1]
