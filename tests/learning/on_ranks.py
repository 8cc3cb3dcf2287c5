"""What `test_ranks.py` has each of two ranks do, and write to a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import BLOCKS, FAST, VOCAB, assert_same, batches, outlier_gpt2, ready, simulate, state
from torch import Tensor

from aimet_quadapter import (
    CalibrationConfig,
    DataError,
    FinetuneConfig,
    QuadapterError,
    apply_quadapter,
    calibrate,
    checkpoint,
    find_pairs,
    finetune,
)
from aimet_quadapter.learning.calibration import Calibration
from aimet_quadapter.learning.choice import Search
from aimet_quadapter.learning.learner import Learner
from aimet_quadapter.pairs import attachment

CONFIGS = {
    "blocks": BLOCKS,
    "choice": replace(FAST, steps=5),
    "layers": replace(BLOCKS, objective="layer", steps=5),
    "quantized": replace(BLOCKS, objective="layer", inputs="quantized", steps=5),
}

TUNING = FinetuneConfig(steps=2)


def calibrated(name: str, **given: Any) -> dict[str, Tensor]:
    """All that phase 1 finds: every candidate and every loss, in order."""
    found = calibrate(simulate(outlier_gpt2()), batches(), config=CONFIGS[name], **given)
    return tensors_of(found)


def tensors_of(found: Calibration) -> dict[str, Tensor]:
    tensors = {
        f"{place} {r.pair.name} {name}": alpha.clone().contiguous()
        for place, r in enumerate(found.results)
        for name, alpha in {"kept": r.alpha, **r.candidates}.items()
    }
    losses = [v for r in found.results for v in (*r.losses.values(), *(x for _, x in r.curve))]
    losses += [found.choice.loss, *found.choice.losses.values()] if found.choice else []
    return tensors | {"losses": torch.tensor(losses, dtype=torch.float64)}


def tuned(count: int, accumulate: int, **given: Any) -> dict[str, Tensor]:
    """α, ranges and losses of phase 2 on some batches."""
    sim = ready()
    generator = torch.Generator().manual_seed(3)
    loader = [torch.randint(0, VOCAB, (2, 32), generator=generator) for _ in range(count)]
    config = replace(TUNING, accumulate=accumulate)
    found = finetune(sim, loader, find_pairs(sim), config=config, **given)
    curve = torch.tensor([loss for _, loss in found.curve], dtype=torch.float64)
    ranges = {n: p.detach().clone() for n, p in sim.named_quantizer_parameters()}
    return found.alphas | ranges | {"losses": curve}


def error_of(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except (QuadapterError, OSError, RuntimeError, ZeroDivisionError) as error:
        return [type(error).__name__, str(error)]
    return []


def errors(rank: int, folder: Path) -> dict[str, list[str]]:
    """What is raised where the ranks differ, or one of them fails."""
    sim = simulate(outlier_gpt2())
    pairs, before = find_pairs(sim), state(sim)

    def raised(config: CalibrationConfig = BLOCKS, seed: int = 0) -> list[str]:
        return error_of(lambda: calibrate(sim, batches(seed), pairs, config))

    found = {
        "samples": raised(seed=rank),
        "steps": raised(replace(BLOCKS, steps=15 + rank)),
        "loader": error_of(lambda: calibrate(sim, batches() if rank else [], pairs, BLOCKS)),
    }
    tuning = ready()
    tuned_from = state(tuning)

    def raised_tuning(seed: int = 0, checkpoints: Path | None = None) -> list[str]:
        loader = batches(seed)
        return error_of(
            lambda: finetune(
                tuning, loader, find_pairs(tuning), config=TUNING, checkpoint_dir=checkpoints
            )
        )

    found["batches"] = raised_tuning(rank)
    full = OSError("disk full")
    no_copies = patch.object(attachment, "TemporaryFile", side_effect=full)
    with no_copies if rank == 1 else nullcontext():
        found["copies of phase 2"] = raised_tuning()
        found["copies of all"] = error_of(
            lambda: apply_quadapter(
                sim, batches(), pairs=pairs, calibration=BLOCKS, finetune_loader=batches()
            )
        )
    no_state = patch.object(checkpoint, "save_all", side_effect=full)
    with no_state if rank == 0 else nullcontext():
        found["state"] = raised_tuning(checkpoints=folder)
    assert_same(tuning, tuned_from)
    for name, error in {"ours": DataError("no good"), "other": ZeroDivisionError("of")}.items():
        with patch.object(Learner, "learn", side_effect=error) if rank else nullcontext():
            found[name] = raised()
    for name, failing in {"_ready": 1, "trial": 1, "_store": 0}.items():
        error = DataError(name)
        fails = patch.object(Search, name, side_effect=error) if rank == failing else nullcontext()
        with fails:
            found[name] = raised(CONFIGS["choice"])
    assert_same(sim, before)
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in CONFIGS:
        save_file(calibrated(name), folder / f"{name}.{rank}")
    learned: list[str] = []
    tried: list[str] = []
    learn, try_ = Learner.learn, Search.trial

    def noted(self: Learner) -> Any:
        learned.append(self.error.name)
        return learn(self)

    def noted_trial(self: Search, key: tuple[str, ...]) -> Any:
        tried.append(" ".join(key))
        return try_(self, key)

    checkpoints = folder / "checkpoints"
    with patch.object(Learner, "learn", noted), patch.object(Search, "trial", noted_trial):
        calibrated("choice", checkpoint_dir=checkpoints)
        first, trials = list(learned), list(tried)
        save_file(calibrated("choice", checkpoint_dir=checkpoints), folder / f"resumed.{rank}")
    sim = simulate(outlier_gpt2())
    alone = calibrate(sim, batches(), find_pairs(sim)[:1], BLOCKS)
    save_file(tensors_of(alone), folder / f"alone.{rank}")
    save_file(tuned(4, 1, checkpoint_dir=folder / "phase 2"), folder / f"tuned.{rank}")
    save_file(tuned(4, 1, checkpoint_dir=folder / "phase 2"), folder / f"tuned again.{rank}")
    said = {"learned": first, "trials": trials, "errors": errors(rank, folder / "failed")}
    said["again"] = learned[len(first) :] + tried[len(trials) :]
    (folder / f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
