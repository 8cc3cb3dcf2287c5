"""One run measured: a model and its texts, a sim, the methods, what comes out."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import experiment
import methods
import numpy
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn.modules import custom
from aimet_torch.utils import remove_all_quantizers
from experiment import RunSpec
from model import Model
from record import PACKAGES, peak_memory
from torch import Tensor, nn

import aimet_quadapter
from aimet_quadapter import (
    DataError,
    calibration_samples,
    find_pairs,
    fold,
    keep_module_sites,
    perplexity,
    prepare,
)
from aimet_quadapter.learning.blocks import Block, Run, capture
from aimet_quadapter.progress import Clock

PER_TENSOR = Path(__file__).with_name("per_tensor_asymmetric.json")
"""AIMET configuration with one asymmetric range a tensor, as the paper's."""

BLOCK_BYTES = 2**29
"""Block inputs held at a time."""


class Runner:
    """One run: a sim, the methods, what is measured."""

    def __init__(self, run: RunSpec, model: Model, args: argparse.Namespace) -> None:
        self.run = run
        self.settings = run.settings
        self.model = model
        self.args = args
        self.clock = Clock()
        self.curves: dict[str, list[list[float]]] = {}

    @cached_property
    def data_sha256(self) -> dict[str, str]:
        """Text and split → sha256, of all that the run reads."""
        run, settings = self.run, self.settings
        sources = {(t, settings["evaluation"]["split"]) for t in settings["evaluation"]["texts"]}
        sources |= {(t, settings["evaluation"]["split"]) for t in settings["watch"]["texts"]}
        sources |= {(settings["calibration"]["text"], settings["calibration"]["split"])}
        sources |= {(t, settings["finetuning"]["split"]) for t in run.finetune_texts}
        for source in sorted(sources):
            self.model.ids(*source)
        return {f"{t}/{s}": self.model.sha256[f"{t}/{s}"] for t, s in sorted(sources)}

    @cached_property
    def inputs(self) -> str:
        """Hash of all that the result depends on."""
        run, settings = self.run, self.settings
        stated = [run.methods, run.finetune_texts, run.seed, settings, self.args.device]
        made_with = [self.model.hash, self.data_sha256, sources_sha256()]
        made_with += [version(p) for p in PACKAGES]
        if Path(settings["config_file"]).is_file():
            made_with += [Path(settings["config_file"]).read_text(encoding="utf-8")]
        text = json.dumps([stated, made_with], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self) -> None:
        """Raise DataError unless the texts give the windows asked for and the model takes them."""
        settings, model = self.settings, self.model.loaded[0]
        positions = getattr(model.config, "max_position_embeddings", None)
        lengths = {"evaluation.window": settings["evaluation"]["window"]}
        lengths["calibration.length"] = settings["calibration"]["length"]
        if self.run.finetune_texts:
            lengths["finetuning.length"] = settings["finetuning"]["length"]
        for key, length in lengths.items():
            if positions is not None and length > positions:
                raise DataError(f"{key} is {length}; the model has {positions} positions.")
        self.samples()
        if self.run.finetune_texts:
            self.data(torch.Generator().manual_seed(self.run.seed))

    def measure(self) -> dict[str, Any]:
        """Build the sim, apply the methods, evaluate; what `described` goes with."""
        torch.manual_seed(self.run.seed)
        numpy.random.seed(self.run.seed)  # AIMET's AdaRound draws from it
        with self.clock.timed("sim"):
            subject = self.subject()
        before = self.channels(subject)
        with self.clock.timed("methods"):
            methods.apply(subject, self.run.methods)
        with self.clock.timed("block errors"):
            blocks = self.block_errors(subject)
        with self.clock.timed("evaluate"):
            scores = self.evaluate(subject.sim)
        seconds = self.clock.seconds | subject.seconds
        curves = dict(subject.curves)
        if self.curves:
            curves["perplexity"] = self.curves
        return {
            "perplexity": scores,
            "curves": curves,
            "blocks": blocks,
            "channels": self.channels(subject, before),
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
        settings = self.settings
        prepared = prepare(self.model.loaded[0]).to(self.args.device)
        config_file = settings["config_file"]
        sim = QuantizationSimModel(
            prepared,
            prepared.dummy_input(),
            default_output_bw=settings["activation_bits"],
            default_param_bw=settings["weight_bits"],
            config_file=str(PER_TENSOR) if config_file == "per-tensor-asymmetric" else config_file,
        )
        leave_sites(sim, settings["sites"])
        return sim

    def subject(self) -> methods.Subject:
        """The sim with calibration and fine-tuning data."""
        settings, seed = self.settings, self.run.seed
        sim = self.sim()
        samples = [s.to(self.args.device) for s in self.samples()]
        subject = methods.Subject(
            sim=sim,
            samples=samples,
            pairs=find_pairs(sim, samples[0], kinds=getattr(sim.model, "default_kinds", None)),
            calibration=experiment.stage(settings, "phase1", seed),
            finetuning=experiment.stage(settings, "phase2", seed),
            qat=experiment.stage(settings, "qat", seed),
            adaround_iterations=settings["adaround_iterations"],
            adascale_iterations=settings["adascale_iterations"],
            checkpoint_dir=self.args.cache / "pairs" / self.pairs_key(),
        )
        if self.run.finetune_texts:
            subject.batches = self.batches(subject)
        return subject

    def pairs_key(self) -> str:
        """Folder of the pairs that phase 1 of these settings, this seed and model finished."""
        settings = self.settings
        stated = [self.run.seed, self.model.hash, settings["calibration"], settings["phase1"]]
        text = json.dumps([stated, sources_sha256()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def samples(self) -> list[Tensor]:
        """Calibration samples, each (1, T), that the seed draws."""
        chosen, measured = self.settings["calibration"], self.settings["evaluation"]
        ids = self.model.ids(chosen["text"], chosen["split"])
        seen = torch.cat([self.model.ids(t, measured["split"]) for t in measured["texts"]])
        return list(
            calibration_samples(ids, chosen["samples"], chosen["length"], self.run.seed, seen)
        )

    def data(self, generator: torch.Generator) -> Tensor:
        """Fine-tuning windows (N, T)."""
        chosen = self.settings["finetuning"]
        data = self.model.windows(
            self.run.finetune_texts,
            chosen["split"],
            chosen["samples"],
            chosen["length"],
            generator,
        )
        if len(data) < chosen["batch"]:
            raise DataError(
                f"{len(data)} windows of {chosen['length']} tokens do not make a batch of "
                f"{chosen['batch']}: take more samples, a longer text or a smaller batch."
            )
        return data

    def batches(self, subject: methods.Subject) -> Iterator[Tensor]:
        """Fine-tuning batches (B, T) without end, in an order the seed decides.

        Evaluates on the way where the settings ask for it: whenever a batch is taken, the sim
        holds the α, ranges and weights of the steps before.
        """
        chosen, every = self.settings["finetuning"], self.settings["watch"]["every"]
        generator = torch.Generator().manual_seed(self.run.seed)
        data = self.data(generator)
        step = 0
        while True:
            for rows in torch.randperm(len(data), generator=generator).split(chosen["batch"]):
                if len(rows) < chosen["batch"]:
                    continue
                if every and step % every == 0:
                    for text in self.settings["watch"]["texts"]:
                        score = self.score(subject.sim, text, self.settings["watch"]["tokens"])
                        self.curves.setdefault(text, []).append([step, score])
                yield data[rows].to(self.args.device)
                step += 1

    def evaluate(self, sim: Any) -> dict[str, float]:
        """Text → perplexity."""
        chosen = self.settings["evaluation"]
        return {text: self.score(sim, text, chosen["tokens"]) for text in chosen["texts"]}

    def score(self, sim: Any, text: str, count: int | None) -> float:
        """Perplexity on the first tokens of a text."""
        chosen = self.settings["evaluation"]
        ids = self.model.ids(text, chosen["split"])[:count]
        return perplexity(sim, ids, chosen["window"], progress=False)

    @torch.no_grad()
    def block_errors(self, subject: methods.Subject) -> dict[str, dict[str, Any]]:
        """Error of every block as the methods left it, of a row that has quantizers.

            mean over the consumers of ‖ŷ − y‖² / ‖y‖²

        Both are given what the block reads in the unquantized model on the calibration samples:
        ŷ comes from the block with its weights and ranges of now, y from the unquantized block
        before any weight was rounded or trained, with the α folded that the methods folded.
        """
        if not self.settings["blocks"] or "fp" in self.run.methods:
            return {}
        before = self.sim()
        folded = [pair for pair in subject.pairs if pair.name in subject.alphas]
        fold(before, folded, subject.alphas)
        samples = [(sample,) for sample in subject.samples]
        sims = (before, subject.sim)
        groups = (capture(sim, subject.pairs, samples, BLOCK_BYTES) for sim in sims)
        found = {}
        for old, new in chain.from_iterable(map(zip, *groups)):
            errors = [error for run in range(len(old.runs)) for error in _errors(old, new, run)]
            found[new.pair.name] = {"kind": new.pair.kind, "error": mean(errors)}
        return found

    @torch.no_grad()
    def channels(
        self, subject: methods.Subject, before: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Minimum and maximum of each channel between the modules of the pairs asked for.

        Args:
            subject: measured without quantizers.
            before: what was found before the methods; then both are joined with α.
        """
        wanted = [
            p
            for p in subject.pairs
            if any(fnmatch.fnmatchcase(p.producer, x) for x in self.settings["channels"])
        ]
        if not wanted:
            return {}
        seen: dict[str, list[Tensor]] = {p.name: [] for p in wanted}
        handles = [
            subject.sim.model.get_submodule(p.consumers[0]).register_forward_pre_hook(
                lambda _m, inputs, name=p.name: seen[name].append(inputs[0].flatten(0, -2))
            )
            for p in wanted
        ]
        with remove_all_quantizers(subject.sim.model):
            for sample in subject.samples:
                subject.sim.model(sample)
        for handle in handles:
            handle.remove()
        ends = {}
        for name, parts in seen.items():
            x = torch.cat(parts)  # (tokens, channels)
            ends[name] = {"min": x.amin(0).tolist(), "max": x.amax(0).tolist()}
        if before is None:
            return ends
        return {
            name: {
                "alpha": subject.alphas[name].tolist(),
                "before": before[name],
                "after": after,
                "range_before": [min(before[name]["min"]), max(before[name]["max"])],
                "range_after": [min(after["min"]), max(after["max"])],
            }
            for name, after in ends.items()
            if name in subject.alphas
        }


def leave_sites(sim: QuantizationSimModel, sites: str) -> None:
    """Switch the activation quantizers off that a set of sites does not have.

    Args:
        sim: the sim of a prepared model, every operation quantized.
        sites: "all"; "modules", AIMET's own of a HuggingFace model; "paper", all "except for
            biases, nonlinear operations, and additions".
    """
    if sites == "modules":
        keep_module_sites(sim)
    elif sites == "paper":
        for _, module in sim.named_qmodules():
            if isinstance(module, (custom.Add, nn.Softmax, nn.GELU, nn.Sigmoid)):
                module.output_quantizers[0] = None


def _errors(old: Block, new: Block, number: int) -> list[float]:
    """‖ŷ − y‖² / ‖y‖² of each consumer, in one run of a block."""
    inputs = old.runs[number].inputs
    with old.unquantized():
        targets = old(old.runs[number])
    with new.as_it_is():
        outputs = new(Run(new.runs[number].nodes, inputs))
    squared = ((o - y).pow(2).sum() / y.pow(2).sum() for o, y in zip(outputs, targets, strict=True))
    return [float(one) for one in squared]


@cache
def sources_sha256() -> str:
    """Hash of the code and files that a measurement depends on."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in ("methods", "measure", "model", "experiment")]
    files += [PER_TENSOR, *Path(aimet_quadapter.__file__).parent.rglob("*.py")]
    shown = {"report", "results", "plots", "figures", "cli", "export", "exported", "deploy"}
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f.stem not in shown):
        digest.update(file.read_bytes())
    return digest.hexdigest()
