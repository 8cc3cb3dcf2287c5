"""Before the work: what a run will take, from each piece of it done once on one sample."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, PairError
from ..progress import silent
from . import pieces
from .adapters import Adapters
from .estimate import Estimate, Need, Resumed
from .loading import Subject, transforms_of
from .machine import Memory, in_words
from .observation import RANGE_SAMPLES
from .settings import Settings

EXPORT_BUILDS = 10.0
"""What an export takes besides its bytes, in times that the sim took to be made: both trace it. The
runs of `benchmarks/growth.py` took 7 to 15, SmolLM2's 13."""

GENERATION_BUILDS = 20.0
"""The same of two graphs that generate text."""

EXPORT_BYTES_A_SECOND = 20e6
"""Bytes of weights that an export writes, hashes and reads again in a second."""

EXPORT_COPIES = 7.0
"""Copies of the weights that an export holds at a time, besides the sim's: SmolLM2, 0.61 GiB, had
6.8 GiB where its sim had 2.3 (benchmarks/results/eight_bits/smollm2_htp.json)."""

ADAPTER_COPIES = 4
"""Copies of the weights that folding an adapter holds at a time, besides the sim's."""

CANDIDATES = 5
"""α that are stored of each pair: its starts, the learned one and halfway."""

BYTES_AN_ENCODING = 40
"""Of `model.encodings`, for each scale."""


class Preflight:
    """Measures a run before it is begun; subject and random state stay as they are.

    The model is measured as it was loaded, before a prefix and a rotation, in a sim of its own.

    Args:
        settings: of the run.
        subject: what it works on.
        output: its folder.
        checkpoints: folder that an interrupted run goes on from.
        target: folder of the HuggingFace checkpoint.
        adapters: those that are written for it.
        processes: how many share phase 1.
    """

    def __init__(
        self,
        settings: Settings,
        subject: Subject,
        output: Path,
        checkpoints: Path,
        target: Path,
        adapters: Adapters,
        processes: int = 1,
    ) -> None:
        self.settings = settings
        self.subject = subject
        self.output = output
        self.checkpoints = checkpoints
        self.target = target
        self.adapters = adapters
        self.processes = processes
        self.memory = Memory(next(subject.model.parameters()).device)
        self.seconds: dict[str, float] = {}
        self.peaks = {"load": self.memory.most}
        self.resumed = Resumed()

    def estimate(self) -> Estimate:
        """What the run will take.

        Raises:
            DataError: there is not even memory for the sim, or for one sample.
        """
        import torch

        from ..learning.ranks import alone

        begin = time.perf_counter()
        self._room_for_the_sim()
        device = self.memory.device
        forked = torch.random.fork_rng([device] if self.memory.is_gpu else [])
        with forked, silent(), alone():  # the other ranks do not look ahead
            try:
                sim, pairs = self._measure()
            except torch.OutOfMemoryError as error:
                raise DataError(
                    f"one sample of {self.subject.length} tokens takes more than the "
                    f"{in_words(self.memory.free)} of memory that are free. Make --length smaller, "
                    "or use --device cpu."
                ) from error
        disk = self._disk(sim, pairs)
        del sim
        gc.collect()
        stage, peak = max(self.peaks.items(), key=lambda item: item[1])
        return Estimate(
            pairs=dict(Counter(pair.kind for pair in pairs)),
            seconds=self.seconds,
            peak=max(peak, self.memory.most),
            stage=stage,
            used=self.memory.used,
            free=self.memory.free,
            disk=disk,
            resumed=self.resumed,
            took=time.perf_counter() - begin,
        )

    def _room_for_the_sim(self) -> None:
        size = sum(p.nbytes for p in self.subject.model.parameters())
        if size > self.memory.free:
            raise DataError(
                f"the sim needs {in_words(size)} for the weights once more and "
                f"{in_words(self.memory.free)} are free. Take a smaller model, or another --device."
            )

    @contextmanager
    def _seen(self, stage: str) -> Iterator[None]:
        """Note the largest memory of a stage."""
        with self.memory.watched() as peak:
            yield
        self.peaks[stage] = peak.most

    def _measure(self) -> tuple[Any, Any]:
        """Measure each stage, in the order that the run has them; the sim and its pairs."""
        settings, subject, seconds = self.settings, self.subject, self.seconds
        samples, (_, windows) = len(subject.samples), pieces.window_of(subject)
        with self._seen("evaluate FP32"):
            plain = pieces.scoring(subject.model, subject) * windows
        seconds["evaluate FP32"] = plain
        seconds["report"] = 0.0  # begun here; known below
        with self._seen("prefix and rotation"):
            choosing, turning = pieces.transforming(settings, subject)
        seconds["prefix and rotation"] = choosing + turning
        if choosing or isinstance(settings.prefix, list):
            seconds["evaluate FP32, prefix"] = plain
        with self._seen("quantize"):
            sim, passes = pieces.passing(settings, subject)
        if turning and transforms_of(settings, subject.model)[1] == "auto":
            trials = pieces.choosing_rotation(passes, plain / windows, subject.samples)
            seconds["prefix and rotation"] += trials
            self.peaks["prefix and rotation"] = self.peaks["quantize"] + weights_of(sim)
        if settings.report:
            seen = min(RANGE_SAMPLES, samples)
            seconds["report"] = pieces.reporting(passes, plain / windows, seen)
        seconds["quantize"] = passes.build + passes.set_ranges(samples)
        scored = len(subject.texts) * passes.weights + windows * passes.window
        seconds["evaluate PTQ"] = scored
        pairs, finding = self._learning(sim, passes)
        name = "Quadapter"
        seconds[f"evaluate {name}"] = scored
        for stage, work in self._behind(sim, pairs, passes, finding).items():
            with self._seen(stage):
                seconds[stage] = work()
            name += f" + {stage}"
            seconds[f"evaluate {name}"] = scored
        self._writing(sim, passes)
        return sim, pairs

    def _learning(self, sim: Any, passes: pieces.Passes) -> tuple[Any, float]:
        """Phase 1; the pairs, and the seconds of finding them on one sample."""
        from ..learning.cost import phase_1_cost
        from ..pairs.discovery import find_pairs, nothing_found
        from ..sim.samples import as_samples

        samples = as_samples(self.subject.samples, sim.model)
        kinds = getattr(sim.model, "default_kinds", None)
        begin = time.perf_counter()
        pairs = find_pairs(sim, samples=samples[:1], kinds=kinds)
        finding = time.perf_counter() - begin
        if not pairs:  # one sample does not run every expert
            pairs = find_pairs(sim, samples=samples, kinds=kinds)
        if not pairs:
            raise PairError(nothing_found(pairs))
        with self.memory.watched() as peak:
            config = self.settings.calibration
            cost = phase_1_cost(sim, samples, tuple(pairs), config, self.processes)
        self.seconds["quadapter"] = (
            finding
            + (len(samples) - 1) * cost.record
            + cost.seconds
            + passes.set_ranges(len(samples))
        )
        self.resumed = self._resumed(cost)
        self.peaks["quadapter"] = peak.most + cost.extra
        return pairs, finding

    def _behind(
        self, sim: Any, pairs: Any, passes: pieces.Passes, finding: float
    ) -> dict[str, Callable[[], float]]:
        """Stage behind phase 1 that is asked for → what gives its seconds."""
        settings, subject = self.settings, self.subject
        samples = len(subject.samples)
        stages: dict[str, tuple[object, Callable[[], float]]] = {
            "softmax": (
                settings.compensate_softmax,
                partial(pieces.compensating, sim, subject.samples, finding),
            ),
            "ranges": (settings.choose_ranges, partial(pieces.clipping, passes, samples)),
            "bits": (
                settings.assign_bits,
                partial(pieces.widening, passes, samples, settings.assign_bits),
            ),
            "phase 2": (
                settings.phase_2,
                partial(pieces.finetuning, sim, subject.finetune, pairs, settings.finetuning),
            ),
        }
        return {stage: work for stage, (asked, work) in stages.items() if asked}

    def _writing(self, sim: Any, passes: pieces.Passes) -> None:
        """Export, checkpoint, adapters: by their bytes."""
        size = weights_of(sim)
        builds = {"export": EXPORT_BUILDS, "generation": GENERATION_BUILDS}
        for stage, times in builds.items():
            if getattr(self.settings, stage):
                self.seconds[stage] = times * passes.build + size / EXPORT_BYTES_A_SECOND
                self.peaks[stage] = self.memory.used + round(EXPORT_COPIES * size)
        if self.settings.save_huggingface:
            self.seconds["huggingface"] = size / EXPORT_BYTES_A_SECOND
            self.peaks["huggingface"] = self.memory.used + 2 * size
        if self.settings.adapter:
            self.seconds["adapters"] = len(self.settings.adapter) * size / EXPORT_BYTES_A_SECOND
            self.peaks["adapters"] = self.memory.used + ADAPTER_COPIES * size

    def _resumed(self, cost: Any) -> Resumed:
        """What lies in the folder of checkpoints; whether it fits is seen when it is read."""
        from .. import checkpoint
        from ..learning.resume import FILE

        blocks, trials, spared = cost.stored(self.checkpoints)
        parts = [f"{blocks} of {sum(len(u.pairs) for u in cost.units)} blocks" if blocks else ""]
        parts += [f"{trials} trials of the choice" if trials else ""]
        for folder in sorted(self.checkpoints.glob("phase 2 *")) if self.settings.phase_2 else ():
            if stored := checkpoint.load_all(folder, FILE):
                parts.append(f"{len(stored[2]['curve'])} steps of phase 2")
        there = ", ".join(part for part in parts if part)
        return Resumed(f"{self.checkpoints} holds {there}" if there else "", spared)

    def _disk(self, sim: Any, pairs: Any) -> tuple[Need, ...]:
        """What the run writes, and where."""
        from ..pairs.folding import parameters_of

        settings, size = self.settings, weights_of(sim)
        channels = sum(pair.channels for pair in pairs)
        scales = sum(q.get_scale().numel() for q in sim.quantizers() if q.is_initialized())
        stays = 4 * channels * CANDIDATES
        if settings.phase_2:  # with both moments of Adam
            trained = 4 * (channels + 2 * scales) + size * (settings.finetuning.lr_weights > 0)
            stays += 3 * trained
        needs, passing = [], 0
        if settings.export:
            vocabulary = self.subject.model.config.vocab_size
            stays += size + size * settings.bits[0] // 32 + BYTES_AN_ENCODING * scales
            stays += 4 * vocabulary * self.subject.length
            passing = 2 * size  # the traced file, and the one that an exporter makes of it
        if settings.generation:
            stays += size * settings.bits[0] // 32
        remedy = "Give another --output, or leave the export out (--no-export)."
        needs.append(Need(self.output, stays, passing, remedy))
        if settings.save_huggingface:
            needs.append(Need(self.target, size + self.adapters.size, 0, "Give another folder."))
        copies = sum(p.nbytes for p in parameters_of(sim, pairs))
        copies *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process has its own
        temporary = Path(tempfile.gettempdir())
        needs.append(Need(temporary, 0, copies, "Set TMPDIR to another folder."))
        return tuple(needs)


def weights_of(sim: Any) -> int:
    """Bytes of the model's weights, those of a tied head twice: α of the last norm unties it."""
    from aimet_torch.quantization.base import QuantizerBase

    own = [m for m in sim.model.modules() if not isinstance(m, QuantizerBase)]
    return sum(p.nbytes for m in own for p in m.parameters(recurse=False))
