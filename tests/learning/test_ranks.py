"""Both phases on two ranks, which torchrun starts, beside one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import BLOCKS, batches, outlier_gpt2, outlier_llama, simulate

sys.path.insert(0, str(Path(__file__).parent))

from on_ranks import CONFIGS, calibrated, tensors_of, tuned

from aimet_quadapter import calibrate, find_pairs
from aimet_quadapter.learning.ranks import Ranks
from aimet_quadapter.learning.sharing import runs, shared_out

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank wrote."""
    found = tmp_path_factory.mktemp("ranks")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    program = Path(__file__).with_name("on_ranks.py")
    done = subprocess.run(
        [*start, str(RANKS), str(program), str(found)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return found


def said(folder: Path, key: str) -> list[Any]:
    """What each rank noted."""
    return [json.loads((folder / f"{rank}.json").read_text("utf-8"))[key] for rank in range(RANKS)]


def assert_same_bits(folder: Path, name: str, expected: dict[str, torch.Tensor]) -> None:
    for rank in range(RANKS):
        found = load_file(folder / f"{name}.{rank}")
        assert found.keys() == expected.keys()
        assert not [n for n, x in expected.items() if not torch.equal(found[n], x)]


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_find_what_one_process_finds(folder: Path, name: str) -> None:
    assert_same_bits(folder, name, calibrated(name))


def test_a_rank_may_have_nothing_to_learn(folder: Path) -> None:
    sim = simulate(outlier_gpt2())
    alone = calibrate(sim, batches(), find_pairs(sim)[:1], BLOCKS)
    assert_same_bits(folder, "alone", tensors_of(alone))


def test_each_rank_learns_its_own_pairs_once(folder: Path) -> None:
    """The checkpoints of all lie in one folder, and one process can go on from them."""
    first, second = said(folder, "learned")
    pairs = find_pairs(simulate(outlier_gpt2()))
    assert [*first, *second] == [pair.name for pair in pairs]
    assert first
    assert second
    assert said(folder, "again") == [[], []]
    files = list((folder / "checkpoints").iterdir())
    assert len(files) == len(pairs) + 1  # and the choice
    expected = calibrated("choice", checkpoint_dir=folder / "checkpoints")
    assert_same_bits(folder, "resumed", expected)


def test_each_trial_of_the_choice_is_made_once(folder: Path) -> None:
    first, second = said(folder, "trials")
    assert len({*first, *second}) == len(first) + len(second)
    assert len(second) >= len(first) // 2
    alone = calibrate(simulate(outlier_gpt2()), batches(), config=CONFIGS["choice"]).choice
    assert alone is not None
    assert len(first) + len(second) == alone.trials


def test_what_differs_between_ranks_is_said_on_all(folder: Path) -> None:
    for errors in said(folder, "errors"):
        assert "ranks 0 and 1 differ in the calibration samples" in errors["samples"][1]
        assert "ranks 0 and 1 differ in steps (15 and 16)" in errors["steps"][1]
        assert "ranks 0 and 1 differ in the batches" in errors["batches"][1]
        assert {errors[name][0] for name in ("samples", "steps", "batches")} == {"DataError"}


def test_an_error_of_one_rank_is_raised_on_all(folder: Path) -> None:
    first, second = said(folder, "errors")
    assert first["ours"] == ["DataError", "rank 1: no good"]
    assert second["ours"] == ["DataError", "no good"]
    assert first["other"][0] == "RuntimeError"
    assert "rank 1: ZeroDivisionError: of" in first["other"][1]
    assert "in learn" in first["other"][1] or "_learned" in first["other"][1]  # where it was
    assert second["other"] == ["ZeroDivisionError", "of"]
    assert first["loader"][1].startswith("the loader yields no samples")
    assert second["loader"][1].startswith("rank 0: the loader yields no samples")


def test_an_error_of_one_rank_in_the_choice_is_raised_on_all(folder: Path) -> None:
    first, second = said(folder, "errors")
    for name in ("_ready", "trial"):
        assert first[name] == ["DataError", f"rank 1: {name}"]
        assert second[name] == ["DataError", name]
    assert first["_store"] == ["DataError", "_store"]
    assert second["_store"] == ["DataError", "rank 0: _store"]


def test_a_disk_that_is_full_on_one_rank_is_said_on_all(folder: Path) -> None:
    first, second = said(folder, "errors")
    for name in ("copies of phase 2", "copies of all"):
        assert first[name] == ["OSError", "rank 1: disk full"]
        assert second[name] == ["OSError", "disk full"]
    assert first["state"] == ["OSError", "disk full"]
    assert second["state"] == ["OSError", "rank 0: disk full"]


def test_a_step_of_two_ranks_is_one_on_both_their_batches(folder: Path) -> None:
    one = tuned(4, accumulate=2)
    for name in ("tuned", "tuned again"):  # the second from the checkpoint of the first
        first, second = (load_file(folder / f"{name}.{rank}") for rank in range(RANKS))
        assert first.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6)
            assert torch.equal(first[key], second[key])


def test_runs_are_as_even_as_runs_can_be() -> None:
    assert runs("abcdef", [1, 1, 1, 1, 1, 1], 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert runs("abcd", [5, 1, 1, 3], 2) == [["a"], ["b", "c", "d"]]
    assert runs("abcd", [1, 1, 9, 1], 3) == [["a", "b"], ["c"], ["d"]]
    assert runs("ab", [1, 1], 4) == [["a"], ["b"], [], []]
    assert runs("ab", [3, 4], 1) == [["a", "b"]]


@pytest.mark.parametrize(("name", "layers"), [("layers", [1, 1, 0]), ("quantized", [2, 0, 0])])
def test_layers_stay_whole_and_those_that_read_each_other_together(
    name: str, layers: list[int]
) -> None:
    sim = simulate(outlier_llama())
    pairs = find_pairs(sim)
    shares = shared_out(sim.model, pairs, CONFIGS[name], 3)
    assert [p.name for share in shares for p in share] == [p.name for p in pairs]
    inside = [{n for n in (0, 1) for p in of if f"layers.{n}." in p.producer} for of in shares]
    assert [len(of) for of in inside] == layers


def test_a_process_alone_exchanges_nothing() -> None:
    alone = Ranks()
    assert alone.first
    assert alone.told({"a": 1}) == [{"a": 1}]
    alone.check_same({"a": 1})
    with pytest.raises(ZeroDivisionError, match="as it is"), alone.all_or_none():
        raise ZeroDivisionError("as it is")
