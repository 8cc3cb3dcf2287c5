"""AIMET's AdaRound after SIGKILL: the bits of a run in one go, the modules that were done kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from aimet_torch._base.adaround.adaround_loss import AdaroundLoss
from aimet_torch.adaround.adaround_optimizer import AdaroundOptimizer
from paper import methods, rounding
from tiny import assert_same, batches, ready, state

from aimet_quadapter import CalibrationConfig, checkpoint, find_pairs

ROOT = Path(__file__).parents[2]
ITERATIONS = 6
MODULES = 9
"""Linears of the tiny GPT-2: four a layer and the head."""


def subject(folder: Path | None, **changes: Any) -> methods.Subject:
    """A tiny outlier GPT-2 with the seed that a run has."""
    sim = ready()
    pairs = find_pairs(sim, batches()[0])
    torch.manual_seed(3)
    numpy.random.seed(3)
    settings: dict[str, Any] = {
        "calibration": CalibrationConfig(steps=3),
        "adaround_iterations": ITERATIONS,
        "checkpoint_dir": folder,
    }
    return methods.Subject(sim, batches(), pairs, **settings | changes)


def rounded(folder: Path | None, **changes: Any) -> methods.Subject:
    found = subject(folder, **changes)
    methods.apply(found, ["quadapter_bc", "adaround"])
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each iteration of AIMET's that is done."""
    done: list[int] = []
    real = AdaroundLoss.compute_round_loss

    def counted(*args: Any) -> Any:
        done.append(len(done))
        return real(*args)

    monkeypatch.setattr(AdaroundLoss, "compute_round_loss", counted)
    return done


PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths}
from pathlib import Path
from test_rounding import rounded
from aimet_torch._base.adaround.adaround_loss import AdaroundLoss

real, done = AdaroundLoss.compute_round_loss, 0
def dies(*args):
    global done
    if done == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return real(*args)
AdaroundLoss.compute_round_loss = dies
rounded(Path({folder!r}))
"""


def kill(folder: Path, after: int) -> None:
    """Run in a process of its own that is killed at an iteration."""
    paths = [str(ROOT / name) for name in ("tests", "recipes", "tests/recipes")]
    text = PROGRAM.format(paths=paths, after=after, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == -9, done.stderr[-2000:]


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("adaround */*.safetensors"))


def test_a_process_that_is_killed_goes_on_with_the_next_module(
    tmp_path: Path, steps: list[int]
) -> None:
    """Phase 1 before it, which the second run reads again and does not repeat."""
    whole = rounded(None)
    random = torch.get_rng_state()
    assert len(steps) == MODULES * ITERATIONS
    kill(tmp_path, 3 * ITERATIONS + 2)
    assert len(kept(tmp_path)) == 3
    steps.clear()
    again = rounded(tmp_path)
    assert len(steps) == (MODULES - 3) * ITERATIONS
    assert_same(again.sim, state(whole.sim))
    assert torch.equal(torch.get_rng_state(), random)
    steps.clear()
    finished = rounded(tmp_path)  # all of it is there
    assert steps == []
    assert_same(finished.sim, state(whole.sim))
    assert finished.seconds["AdaRound"] == pytest.approx(again.seconds["AdaRound"])
    assert not list(tmp_path.rglob("*.partial"))


def test_the_rounding_is_aimets_and_not_to_the_nearest(tmp_path: Path) -> None:
    """What the bits above are compared by: weights that moved, and differently by the seed."""
    one, more = rounded(None), rounded(None, adaround_iterations=2 * ITERATIONS)
    name = next(n for n, _ in one.sim.model.named_parameters() if n.endswith("c_fc.weight"))
    plain = ready().model.get_parameter(name)
    first, second = (s.sim.model.get_parameter(name) for s in (one, more))
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("change", ["iterations", "samples", "seed", "weights"])
def test_what_was_learned_for_something_else_is_not_read(
    change: str, tmp_path: Path, steps: list[int]
) -> None:
    methods.adaround(subject(tmp_path))
    before = {file: file.read_bytes() for file in kept(tmp_path)}
    assert len(before) == MODULES
    other = subject(tmp_path)
    if change == "iterations":
        other.adaround_iterations = 2 * ITERATIONS
    elif change == "samples":
        other.samples = batches(seed=9)
    elif change == "seed":
        torch.manual_seed(4)
    else:
        with torch.no_grad():
            next(other.sim.model.parameters()).mul_(1.01)
    steps.clear()
    methods.adaround(other)
    assert len(steps) == MODULES * other.adaround_iterations
    assert {file: file.read_bytes() for file in before} == before  # the first run's stay
    assert len(kept(tmp_path)) == 2 * MODULES


def test_behind_a_file_that_is_gone_or_broken_all_is_rounded_anew(
    tmp_path: Path, steps: list[int]
) -> None:
    whole = subject(tmp_path)
    methods.adaround(whole)
    names = [n for n, m in whole.sim.model.named_modules() if isinstance(m, torch.nn.Linear)]
    (folder,) = tmp_path.glob("adaround *")
    files = [checkpoint.path_of(folder, name) for name in names]
    assert {*files} == {*kept(tmp_path)}
    for place, spoil in ((5, Path.unlink), (2, lambda file: file.write_bytes(b"\0" * 9))):
        spoil(files[place])
        steps.clear()
        again = subject(tmp_path)
        methods.adaround(again)
        assert len(steps) == (MODULES - place) * ITERATIONS
        assert_same(again.sim, state(whole.sim))


def test_an_aimet_that_rounds_in_another_way_is_noticed(tmp_path: Path) -> None:
    own = vars(AdaroundOptimizer)["adaround_module"]
    kept_rounding = rounding.KeptRounding(tmp_path, "mark")
    with (
        pytest.raises(RuntimeError, match="adaround_module for no module"),
        kept_rounding.applied(),
    ):
        pass
    with pytest.raises(KeyError), kept_rounding.applied():
        raise KeyError
    assert vars(AdaroundOptimizer)["adaround_module"] is own
