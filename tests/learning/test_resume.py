"""Phase 2 and quantization-aware training go on where they were interrupted, to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, batches, ready, state
from torch import Tensor
from torch.utils.data import DataLoader

from aimet_quadapter import (
    DataError,
    FinetuneConfig,
    apply_quadapter,
    checkpoint,
    find_pairs,
    finetune,
)
from aimet_quadapter.learning import resume
from aimet_quadapter.pairs.attachment import is_attached

STEPS = 5


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """A clock on which every step takes longer than a pause and a write takes no time."""

        @staticmethod
        def monotonic() -> float:
            Clock.now += resume.SECONDS
            return Clock.now

        now = 0.0

    monkeypatch.setattr(resume, "time", Clock)
    monkeypatch.setattr(resume, "SECONDS", 1e-9)


def shuffled() -> DataLoader[Tensor]:
    """Batches in an order that is drawn anew each time the loader is gone through."""
    return DataLoader(torch.cat(batches()), batch_size=1, shuffle=True)


class Dies:
    """A loader that is interrupted before its n-th batch."""

    def __init__(self, loader: Any, after: int) -> None:
        self.loader, self.after = loader, after

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            if not self.after:
                raise KeyboardInterrupt
            self.after -= 1
            yield batch


CHANGES: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"parametrization": "plain", "log_ranges": False},
    {"lr_alpha": 0.0, "lr_weights": 1e-3},
    {"lr_ranges": 0.0, "loss": "distillation"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_an_interrupted_phase_2_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = FinetuneConfig(steps=STEPS, **changes)

    def run(loader: Any, folder: Path | None) -> tuple[Any, Any]:
        sim = ready()
        pairs = find_pairs(sim) if config.lr_alpha else []
        before = state(sim)
        try:
            return sim, finetune(sim, loader, pairs, config=config, checkpoint_dir=folder)
        except KeyboardInterrupt:
            assert_same(sim, before)
            assert not is_attached(sim)
            raise

    ready()  # made once, and that draws random numbers
    torch.manual_seed(3)
    sim, whole = run(shuffled(), None)
    random = torch.get_rng_state()
    for after in (1, 2, 3):
        torch.manual_seed(3)  # as the program does when it is run again
        with pytest.raises(KeyboardInterrupt):
            run(Dies(shuffled(), after), tmp_path)
    torch.manual_seed(7)
    again, resumed = run(shuffled(), tmp_path)
    assert resumed.curve == whole.curve
    assert all(torch.equal(a, whole.alphas[n]) for n, a in resumed.alphas.items())
    assert_same(again, state(sim))
    assert torch.equal(torch.get_rng_state(), random)
    done, finished = run(shuffled(), tmp_path)  # all of it is there
    assert finished.curve == whole.curve
    assert_same(done, state(sim))


def interrupt(folder: Path, config: FinetuneConfig) -> Any:
    sim = ready()
    with pytest.raises(KeyboardInterrupt):
        finetune(sim, Dies(batches(), 2), find_pairs(sim), config=config, checkpoint_dir=folder)
    return sim


def test_what_does_not_fit_is_refused_by_its_name(tmp_path: Path) -> None:
    config = FinetuneConfig(steps=STEPS)
    sim = interrupt(tmp_path, config)
    pairs = find_pairs(sim)
    other = FinetuneConfig(steps=STEPS, lr_alpha=0.02)
    for arguments, said in (
        ((batches(), pairs, None, other), r"lr_alpha differs \(0.01 there, 0.02 here\)"),
        ((batches(), list(pairs)[1:], None, config), "the pairs and their α differs"),
        ((batches()[::-1], pairs, None, config), "the batches are not the same"),
    ):
        before = state(sim)
        with pytest.raises(DataError, match=said):
            finetune(sim, *arguments, checkpoint_dir=tmp_path)
        assert_same(sim, before)
        assert not is_attached(sim)
    with torch.no_grad():
        next(sim.model.parameters()).mul_(2)
    with pytest.raises(DataError, match="the model, its weights and ranges differs"):
        finetune(sim, batches(), pairs, config=config, checkpoint_dir=tmp_path)


def test_a_finished_run_is_not_taken_for_one_on_other_batches(tmp_path: Path) -> None:
    config = FinetuneConfig(steps=2)
    for loader, said in (
        (batches(), ""),
        (batches()[::-1], "the batches are not the same"),
        ([], "yields no batches"),
    ):
        sim = ready()
        arguments = {"config": config, "checkpoint_dir": tmp_path}
        if said:
            with pytest.raises(DataError, match=said):
                finetune(sim, loader, find_pairs(sim), **arguments)
        else:
            finetune(sim, loader, find_pairs(sim), **arguments)


def test_a_finished_run_and_a_broken_file_are_in_nobodys_way(tmp_path: Path) -> None:
    for steps in (2, 3):
        sim = ready()
        config = FinetuneConfig(steps=steps)
        pairs = find_pairs(sim)
        found = finetune(sim, batches(), pairs, config=config, checkpoint_dir=tmp_path)
        assert len(found.curve) == steps
    interrupt(tmp_path, FinetuneConfig(steps=STEPS))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    sim = ready()
    config = FinetuneConfig(steps=STEPS, lr_alpha=0.02)
    found = finetune(sim, batches(), find_pairs(sim), config=config, checkpoint_dir=tmp_path)
    assert len(found.curve) == STEPS


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny import batches, ready
from aimet_quadapter import CalibrationConfig, FinetuneConfig, apply_quadapter
from aimet_quadapter.learning import resume
resume.SECONDS = 0.0

class Killed:
    left = {after}
    def __iter__(self):
        for batch in batches():
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            yield batch

apply_quadapter(ready(), batches(), calibration=CalibrationConfig(steps=3),
                finetune_loader=Killed(), finetuning=FinetuneConfig(steps=5),
                checkpoint_dir={folder!r})
"""


def test_a_process_that_is_killed_loses_nothing_that_was_written(tmp_path: Path) -> None:
    from aimet_quadapter import CalibrationConfig

    settings = {
        "calibration": CalibrationConfig(steps=3),
        "finetune_loader": batches(),
        "finetuning": FinetuneConfig(steps=5),
    }
    sim = ready()
    apply_quadapter(sim, batches(), **settings)
    tests = str(Path(__file__).parents[1])
    text = PROGRAM.format(tests=tests, after=3, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr[-2000:]
    _, _, record = checkpoint.load_all(tmp_path, resume.FILE)
    assert 0 < len(record["curve"]) < 5
    other = FinetuneConfig(steps=5, lr_alpha=0.02)
    with pytest.raises(DataError, match="lr_alpha differs"):
        apply_quadapter(
            ready(), batches(), **settings | {"finetuning": other}, checkpoint_dir=tmp_path
        )
    again = ready()
    result = apply_quadapter(again, batches(), **settings, checkpoint_dir=tmp_path)
    assert result.finetuning is not None
    assert_same(again, state(sim))
