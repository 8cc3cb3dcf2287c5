"""`apply_quadapter`: the one file that joins the stages."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import CalibrationConfig, FinetuneConfig
from .errors import PairError
from .learning.calibration import Calibration, calibrate
from .learning.finetuning import Finetuning, finetune
from .learning.ranks import joined
from .pairs.attachment import refuse_attached
from .pairs.discovery import find_pairs, nothing_found
from .pairs.folding import fold, weights_restored
from .pairs.pair import Pair, Pairs
from .sim.checks import check_sim
from .sim.inputs import Sample
from .sim.ranges import restored, set_ranges
from .sim.samples import as_samples


@dataclass(frozen=True)
class QuadapterResult:
    """What `apply_quadapter` did.

    Attributes:
        pairs: the pairs that were folded, with the refused candidates.
        alphas: pair name → α folded into the sim's weights, both phases together.
        calibration: result of phase 1.
        finetuning: result of phase 2, None without it.
        seconds: stage → wall time.
    """

    pairs: Pairs
    alphas: dict[str, Tensor]
    calibration: Calibration
    finetuning: Finetuning | None
    seconds: dict[str, float]

    def __str__(self) -> str:
        lines = [str(self.calibration)]
        if self.finetuning is not None:
            lines.append(str(self.finetuning))
        lines.append("wall time: " + ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items()))
        return "\n".join(lines)


def apply_quadapter(
    sim: Any,
    calib_loader: Iterable[Any],
    *,
    pairs: Iterable[Pair] | None = None,
    calibration: CalibrationConfig | None = None,
    finetune_loader: Iterable[Any] | None = None,
    finetuning: FinetuneConfig | None = None,
    checkpoint_dir: str | Path | None = None,
) -> QuadapterResult:
    """Learn one scale per channel for every pair of a sim and fold it into the weights.

    Phase 1 on every pair; ranges set on the calibration data; phase 2 if there is a loader for
    it; fold. Afterwards the sim holds plain weights and AIMET's own quantizers with their ranges
    set: evaluate it, run AdaRound or SeqMSE on it, export it as any sim.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.
    Where `torch.distributed` is initialised all ranks have to call it, and share the work of both
    phases.

    Args:
        sim: an AIMET `QuantizationSimModel`, with the bit widths and config file you want; its
            weights and ranges are changed in place. Of a model made by `prepare`, or any other.
        calib_loader: yields inputs of the model, e.g. token ids (B, T); a few thousand tokens are
            enough.
        pairs: pairs to use. When not given, those that `find_pairs` finds, of the kinds that a
            prepared model names in `default_kinds` (GPT-2: the paper's), else of all kinds.
        calibration: settings of phase 1; `CalibrationConfig.paper()` for the paper's.
        finetune_loader: yields batches of token ids for phase 2; None leaves phase 2 out.
        finetuning: settings of phase 2; `FinetuneConfig.paper()` for the paper's.
        checkpoint_dir: folder for the finished blocks of phase 1 and the state of phase 2, to
            resume an interrupted run.

    Returns:
        α of each pair, losses, times, and what was kept.

    Raises:
        SimError, DataError, PairError, UnfoldedError: see their messages.
        On any exception, Ctrl-C included, the sim is as it was before the call.
    """
    seconds: dict[str, float] = {}
    with joined() as ranks, ranks.all_or_none():
        check_sim(sim)
        refuse_attached(sim)
        samples = as_samples(calib_loader, sim.model)
        begin = time.perf_counter()
        chosen = _choose(sim, samples) if pairs is None else Pairs(tuple(pairs))
        if not chosen:
            raise PairError(nothing_found(chosen))
    seconds["find pairs"] = time.perf_counter() - begin
    phase1 = calibrate(sim, samples, chosen, calibration, checkpoint_dir)
    seconds["phase 1"] = phase1.seconds
    alphas = phase1.alphas
    phase2 = None
    with (
        joined() as ranks,
        ranks.entered(
            restored(list(sim.quantizers()), only_on_error=True),
            weights_restored(sim, chosen, only_on_error=True),
        ),
    ):
        begin = time.perf_counter()
        with ranks.all_or_none():
            fold(sim, chosen, alphas)
            set_ranges(sim, samples)
        seconds["ranges"] = time.perf_counter() - begin
        if finetune_loader is not None:
            phase2 = finetune(sim, finetune_loader, chosen, alphas, finetuning, checkpoint_dir)
            seconds["phase 2"] = phase2.seconds
            alphas = {name: alphas[name] * factor for name, factor in phase2.alphas.items()}
            fold(sim)
    return QuadapterResult(chosen, alphas, phase1, phase2, seconds)


def _choose(sim: Any, samples: list[Sample]) -> Pairs:
    """What `find_pairs` finds, of the kinds that the architecture uses by default."""
    return find_pairs(sim, samples=samples, kinds=getattr(sim.model, "default_kinds", None))
