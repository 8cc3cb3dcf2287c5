"""One run measured: a model and its texts, a sim, the methods, what comes out."""

from __future__ import annotations

import argparse
import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from aimet_torch import QuantizationSimModel

from aimet_quadapter import checkpoint, find_pairs, perplexity
from aimet_quadapter.progress import Clock

from . import fingerprint, methods
from .data import Data
from .experiment import RunSpec
from .model import Model
from .observations import block_errors, channel_change, channel_ends
from .record import peak_memory
from .sims import make_sim

WATCHED = "watched"
"""Name of the checkpoint of what was evaluated on the way."""


class Runner:
    """One run: a sim, the methods, what is measured."""

    def __init__(self, run: RunSpec, model: Model, args: argparse.Namespace) -> None:
        self.run = run
        self.settings = run.settings
        self.model = model
        self.data = Data(run, model)
        self.args = args
        self.clock = Clock()
        self.curves: dict[str, list[list[float]]] = {}

    @cached_property
    def inputs(self) -> str:
        """Hash of all that the result depends on."""
        args = (self.run, self.args.device, self.model.hash, self.data.sha256)
        return fingerprint.of_result(*args)

    def measure(self) -> dict[str, Any]:
        """Build the sim, apply the methods, evaluate; what `described` goes with."""
        torch.manual_seed(self.run.seed)
        numpy.random.seed(self.run.seed)  # AIMET's AdaRound draws from it
        producers = self.settings["channels"]
        with self.clock.timed("sim"):
            subject = self.subject()
        before = channel_ends(subject, producers)
        with self.clock.timed("methods"):
            methods.apply(subject, self.run.methods)
        with self.clock.timed("block errors"):
            quantized = "fp" not in self.run.methods
            wanted = self.settings["blocks"] and quantized
            blocks = block_errors(self.sim(), subject) if wanted else {}
        with self.clock.timed("evaluate"):
            scores = self.evaluate(subject.sim)
        seconds = self.clock.seconds | subject.seconds
        curves = dict(subject.curves)
        if self.curves:
            curves["perplexity"] = self.curves
        after = channel_ends(subject, producers)
        return {
            "perplexity": scores,
            "curves": curves,
            "blocks": blocks,
            "channels": channel_change(before, after, subject.alphas),
            "seconds": {stage: round(taken, 2) for stage, taken in seconds.items()},
            "peak_memory_gib": round(peak_memory(self.args.device), 2),
        }

    def described(self) -> dict[str, Any]:
        """What the run is, as `report` reads it."""
        run, x = self.run, self.run.x
        return {
            "schema": 1,
            "experiment": run.experiment,
            "title": run.title,
            "row": run.row,
            "methods": list(run.methods),
            "scale": run.scale,
            "model": self.settings["model"],
            "finetune_text": " + ".join(run.finetune_texts) or None,
            "seed": run.seed,
            "settings": {**self.settings, "text_dir": self.args.text_dir is not None},
            "changes": dict(run.changes),
            "x": {"name": x[0], "value": x[1]} if x else None,
        }

    def sim(self) -> QuantizationSimModel:
        """The sim of the prepared model, no range set yet."""
        return make_sim(self.model.loaded[0], self.settings, self.args.device)

    def subject(self) -> methods.Subject:
        """The sim with calibration and fine-tuning data."""
        sim = self.sim()
        samples = [s.to(self.args.device) for s in self.data.samples()]
        pairs_key = fingerprint.of_pairs(self.run, self.model.hash)
        subject = methods.Subject(
            sim=sim,
            samples=samples,
            pairs=find_pairs(sim, samples[0], kinds=getattr(sim.model, "default_kinds", None)),
            calibration=self.run.stage("phase1"),
            finetuning=self.run.stage("phase2"),
            qat=self.run.stage("qat"),
            adaround_iterations=self.settings["adaround_iterations"],
            adascale_iterations=self.settings["adascale_iterations"],
            checkpoint_dir=self.args.cache / "pairs" / pairs_key,
        )
        if self.run.finetune_texts:
            subject.batches = self.data.batches
            subject.tuning_dir = self.tuning_dir
            if self.settings["watch"]["every"]:
                stored = checkpoint.load_all(self.tuning_dir, WATCHED)
                self.curves = stored[2] if stored else {}
                subject.on_step = partial(self.watch, subject.sim)
        return subject

    def watch(self, sim: Any, step: int) -> None:
        """Evaluate on the way, where it is time to."""
        watch = self.settings["watch"]
        if step % watch["every"]:
            return
        for text in watch["texts"]:
            before = [point for point in self.curves.get(text, []) if point[0] < step]
            self.curves[text] = [*before, [step, self.score(sim, text, watch["tokens"])]]
        checkpoint.save_all(self.tuning_dir, WATCHED, WATCHED, {}, self.curves)

    @property
    def tuning_dir(self) -> Path:
        """Where an interrupted phase 2 or QAT goes on from."""
        return self.args.cache / "tuning" / self.inputs[:16]

    def clear(self) -> None:
        """Remove what the run would have gone on from."""
        shutil.rmtree(self.tuning_dir, ignore_errors=True)

    def evaluate(self, sim: Any) -> dict[str, float]:
        """Text → perplexity."""
        chosen = self.settings["evaluation"]
        return {text: self.score(sim, text, chosen["tokens"]) for text in chosen["texts"]}

    def score(self, sim: Any, text: str, count: int | None) -> float:
        """Perplexity on the first tokens of a text."""
        ids = self.data.evaluation(text, count)
        window, prefix = self.settings["evaluation"]["window"], self.data.prefix
        return perplexity(sim, ids, window, prefix=prefix, progress=False)
