"""`quadapter run [MODEL]`: quantize with and without Quadapter, compare, export."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import yaml

from .adapters import SUFFIX, Adapters
from .arguments import Ahead, add_settings, settings_of, take_preflight
from .estimate import Estimate
from .launch import launched, together
from .loading import load, simulate, transform
from .machine import Memory, size_of
from .observation import Observation
from .settings import RECIPE, Settings
from .summary import (
    headline,
    next_steps,
    no_path,
    run_versions,
    to_generate,
    what_is_run,
    what_it_took,
)

EXPORTED = "export"
"""Folder that `quadapter run` exports to, in its output folder."""

GENERATION = "generation"
"""Folder of the graphs that generate text, in the output folder."""

HUGGINGFACE = "huggingface"
"""Folder of the HuggingFace checkpoint, in the output folder."""

ADAPTERS = f"{HUGGINGFACE}{SUFFIX}"
"""Folder of the LoRA adapters for it, in the output folder."""

CHECKPOINTS = "checkpoints"
"""Folder with what an interrupted run goes on from, in the output folder."""

REPORT = "report.html"
"""The page about a run, in its output folder."""

APART = (
    *("output", "export", "report", "opset", "generation", "save_huggingface", "adapter"),
    *("evaluation_text", "eval_tokens"),
)
"""Settings that phase 2 does not depend on."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser(
        "run",
        help="quantize a language model with and without Quadapter, compare, export",
        description="Quantize a language model with and without Quadapter, compare, export. "
        "Every setting is a key of a recipe's file too (docs/settings.md).",
    )
    add_settings(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Settings → a run, or their list."""
    ahead = take_preflight(args)
    if settings := settings_of(args):
        Run(settings, ahead=ahead).go()


class Run:
    """One run: what it works on, what it measured.

    Args:
        settings: all of them.
        checkpoint: folder of the HuggingFace checkpoint; one in the output folder when not given.
        ahead: what is done before the work; an estimate when not given.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Path | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        from ..progress import Clock

        self.settings = settings
        self.ahead = ahead or Ahead()
        self.estimate: Estimate | None = None
        self.output = Path(settings.output)
        self.checkpoint = checkpoint or self.output / HUGGINGFACE
        self.adapters = Adapters(settings.adapter or (), self.checkpoint)
        self.clock = Clock()
        self.scores: dict[str, dict[str, float]] = {}
        self.pairs: list[str] = []
        self.folded: dict[str, Any] = {}
        self.alphas: dict[str, Any] = {}

    def go(self) -> None:
        """Load, estimate; measure, quantize, apply Quadapter, measure, export, write the result.

        Of several ranks all learn, and only the first measures and writes: the others leave when
        α is chosen or, with phase 2, tuned.

        Raises:
            DataError: the machine has not the memory or the disk; nothing is written then.
        """
        with launched(self.settings.device) as self.ranks:
            with together(self.ranks):
                sim = self.quantized()
            if sim is None:
                return
            with together(self.ranks):
                result = self.calibrate(sim)
            if self.ranks.first or self.settings.phase_2:
                self.go_on(sim, result)
            if self.ranks.first:
                self.write(sim)

    def quantized(self) -> Any:
        """The sim, its ranges set, of the model with a prefix and rotated; None after a dry run."""
        settings, output = self.settings, self.output
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} is a file: name a folder (--output).")
        with self.clock.timed("load"):
            from ..artifacts.manifest import check_target

            for folder in self.folders():
                check_target(folder, overwrite=True)
            if settings.save_huggingface:
                check_target(self.checkpoint, overwrite=False)
            self.adapters.check()
            self.subject = subject = load(settings, self.ranks.size)
            self.adapters.check_fit(subject, settings.compensate_softmax)
        print(headline(settings, subject))
        if self.ahead.estimate and self.ranks.first:
            self.look_ahead()
        if self.ahead.stop:
            return None
        output.mkdir(parents=True, exist_ok=True)
        print(f"\n{'perplexity':<24}" + "".join(f" {text[-12:]:>12}" for text in subject.texts))
        self.observation = Observation(subject, settings.report and self.ranks.first)
        self.measure("FP32", subject.model)
        with self.clock.timed("report"):
            self.observation.see_stream()
        with self.clock.timed("prefix and rotation"):
            transform(settings, subject)
        with self.clock.timed("report"):
            self.observation.see_stream()
        if settings.save_huggingface:
            from ..exporting.checkpoint_folder import check_place

            check_place(subject.model, subject.hf_model, settings.compensate_softmax)
        if subject.model.prefix:
            self.measure("FP32, prefix", subject.model)
        with self.clock.timed("quantize"):
            from ..sim.ranges import set_ranges

            sim = simulate(settings, subject.model)
            set_ranges(sim, subject.samples)
        self.measure("PTQ", sim)
        return sim

    def write(self, sim: Any) -> None:
        """Exports, the result, the page, the checkpoint; then say what it took and what is next."""
        settings, output = self.settings, self.output
        if settings.export:
            with self.clock.timed("export"):
                self.export(sim)
        if settings.generation:
            with self.clock.timed("generation"):
                self.export_generation(sim, *settings.generation)
        self.write_result()  # what follows may fail
        if settings.report:
            self.write_report(sim)
        if settings.save_huggingface:
            with self.clock.timed("huggingface"):
                self.save_huggingface(sim)
        if settings.adapter:
            with self.clock.timed("adapters"):
                self.adapters.write(sim, self.subject, self.folded.values(), self.alphas)
        self.write_result()
        print(what_it_took(self.clock.seconds, self.estimate), f"written to {output}", sep="\n")
        if settings.export:
            print(next_steps(output / EXPORTED, settings.opset))
        if settings.generation:
            print(to_generate(output / GENERATION))

    def folders(self) -> list[Path]:
        """What is exported to, an earlier export overwritten."""
        wanted = {EXPORTED: self.settings.export, GENERATION: self.settings.generation}
        return [self.output / name for name, asked in wanted.items() if asked]

    def look_ahead(self) -> None:
        """Estimate what the run takes, say it, and refuse what the machine has not."""
        from .preflight import Preflight

        with self.clock.timed("preflight"):
            self.estimate = Preflight(
                self.settings,
                self.subject,
                output=self.output,
                checkpoints=self.output / CHECKPOINTS,
                target=self.checkpoint,
                adapters=self.adapters,
                processes=self.ranks.size,
            ).estimate()
        print(self.estimate, flush=True)
        self.estimate.check()

    def measure(self, name: str, model: Any) -> None:
        """A line of the table: the perplexity of each text. The first rank's alone."""
        if not self.ranks.first:
            return
        from ..evaluation.scores import perplexity

        subject = self.subject
        with self.clock.timed(f"evaluate {name}"):
            self.scores[name] = {
                text: perplexity(model, ids, subject.window, prefix=subject.begins_with)
                for text, ids in subject.texts.items()
            }
        cells = "".join(f" {value:12.3f}" for value in self.scores[name].values())
        print(f"{name:<24}{cells}", flush=True)

    def calibrate(self, sim: Any) -> Any:
        """Phase 1, folded."""
        from ..pipeline import apply_quadapter

        with self.clock.timed("quadapter"):
            result = apply_quadapter(
                sim,
                self.subject.samples,
                calibration=self.settings.calibration,
                checkpoint_dir=self.output / CHECKPOINTS,
            )
        self.pairs = [pair.name for pair in result.pairs]
        self.note_alphas(result.pairs, result.alphas)
        return result

    def go_on(self, sim: Any, result: Any) -> None:
        """Measure phase 1, and what is asked for behind it, each measured.

        Where there is a phase 2 all ranks do it, and what comes before it; else the first alone.
        """
        from ..learning.ranks import Ranks
        from ..pairs.folding import fold
        from ..precision import assign_bits, choose_ranges, compensate_softmax

        settings, subject, name = self.settings, self.subject, "Quadapter"
        ranks = self.ranks if settings.phase_2 else Ranks()
        self.measure(name, sim)
        print(f"\n{result}\n")
        self.observation.result = result
        stages = {
            "softmax": settings.compensate_softmax
            and (lambda: compensate_softmax(sim, subject.samples)),
            "ranges": settings.choose_ranges and (lambda: choose_ranges(sim, subject.samples)),
            "bits": settings.assign_bits
            and (lambda: assign_bits(sim, subject.samples, settings.assign_bits)),
            "phase 2": settings.phase_2 and (lambda: self.fine_tune(sim, result.pairs)),
        }
        for stage, work in stages.items():
            if work:
                with self.clock.timed(stage), together(ranks):
                    found = work()
                print(f"\n{found}\n")
                self.observation.see_stage(stage, found)
                name += f" + {stage}"
                if stage == "phase 2":
                    fold(sim)
                self.measure(name, sim)

    def fine_tune(self, sim: Any, before: Any) -> Any:
        """Phase 2, on pairs of the kinds that phase 1 had; its α are attached to the sim then."""
        from ..learning.finetuning import finetune
        from ..pairs.discovery import find_pairs

        pairs = find_pairs(sim, kinds={pair.kind for pair in before})
        folder = self.output / CHECKPOINTS / self.mark()
        settings, batches = self.settings.finetuning, self.subject.finetune
        found = finetune(sim, batches, pairs, config=settings, checkpoint_dir=folder)
        self.note_alphas(pairs, found.alphas)
        return found

    def note_alphas(self, pairs: Any, alphas: Any) -> None:
        """Note what a phase scales by, on top of the phases before it."""
        for pair in pairs:
            before = self.alphas.get(pair.name)
            alpha = alphas[pair.name].detach()
            self.folded[pair.name] = pair
            self.alphas[pair.name] = alpha if before is None else before * alpha

    def export(self, sim: Any) -> None:
        """Export the sim; the first window of the first text is its reference."""
        import torch

        from ..exporting.whole_model import export

        subject = self.subject
        inputs = sim.model.dummy_input(length=subject.length)
        text = next(iter(subject.texts.values()))
        begin = text.new_tensor(subject.begins_with)
        length = subject.length - len(begin)
        window = torch.cat((begin, text[:length]))[None]
        target = self.output / EXPORTED
        export(
            sim,
            inputs,
            target,
            strict=False,
            overwrite=True,
            perplexities=self.flat_scores(),
            pairs=self.pairs,
            tokenizer=subject.tokenizer,
            reference=window if len(text) >= length else None,
            opset=self.settings.opset,
        )
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        if missing := manifest["operations_without_encoding"]:
            print(f"{len(missing)} operations carry no encoding; {target}/manifest.json lists them")

    def export_generation(self, sim: Any, prompt: int, cache: int) -> None:
        """Export the graphs that generate text."""
        from ..exporting.generation import export_generation

        export_generation(
            sim,
            self.output / GENERATION,
            prompt_length=prompt,
            cache_length=cache,
            tokenizer=self.subject.tokenizer,
            opset=self.settings.opset,
            overwrite=True,
        )

    def save_huggingface(self, sim: Any) -> None:
        """Write the checkpoint."""
        from ..exporting.checkpoint_folder import save_huggingface

        subject, folder = self.subject, self.checkpoint
        shown = {key: no_path(value) for key, value in self.recipe().items()}
        notes = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
        save_huggingface(
            sim,
            subject.hf_model,
            folder,
            tokenizer=subject.tokenizer,
            pairs=self.pairs,
            perplexities=self.flat_scores(),
            same_function=not self.settings.finetuning.lr_weights,
            notes=f"## Recipe\n\nOf `quadapter run --recipe FILE`:\n\n```yaml\n{notes}```",
        )
        print(f"HuggingFace checkpoint: {folder}")

    def flat_scores(self) -> dict[str, float]:
        """Every perplexity by a name of its own: that of the text is in it where there are more."""
        several = len(self.subject.texts) > 1
        return {
            f"{row}, {text}" if several else row: value
            for row, values in self.scores.items()
            for text, value in values.items()
        }

    def mark(self) -> str:
        """Name of the folder of phase 2's state: a run with other settings has another."""
        from ..checkpoint import fingerprint

        recipe = {k: v for k, v in self.recipe().items() if k not in APART}
        return f"phase 2 {fingerprint(recipe, [])[:8]}"

    def recipe(self) -> dict[str, Any]:
        """The settings, with the prefix and the rotation that were chosen."""
        subject = self.subject
        chosen = {"prefix": list(subject.model.prefix) or "none", "rotate": subject.rotated}
        return self.settings.model_dump(mode="json") | chosen

    def write_report(self, sim: Any) -> None:
        """Write the page; result.json is there already."""
        with self.clock.timed("report"):  # most of its time: the page can say it
            self.observation.see_end(sim, self.alphas)
        file = self.output / REPORT
        recipe = {key: no_path(value) for key, value in self.recipe().items()}
        shown = self.settings.model_copy(update={"model": recipe["model"]})
        measured = {
            "headline": [line.split(maxsplit=1) for line in what_is_run(shown, self.subject)],
            "perplexity": self.scores,
            "seconds": dict(self.clock.seconds),
            "settings": recipe,
            "versions": run_versions() | {"machine": platform.platform()},
        }
        with self.clock.timed("report"):
            self.observation.write(file, measured)
        print(f"report: {file} ({self.clock.seconds['report']:.0f} s)")

    def write_result(self) -> None:
        """Write `result.json`: a recipe of this run, and its figures."""
        subject = self.subject
        record: dict[str, Any] = {
            RECIPE: self.recipe(),
            "windows_begin_with": subject.begins_with,
            "perplexity": self.scores,
            "seconds": {stage: round(value, 2) for stage, value in self.clock.seconds.items()},
            "versions": run_versions(),
            "machine": platform.platform(),
        }
        if self.estimate:
            record["estimated"] = self.estimate.record()
        record["peak_bytes"] = Memory(next(subject.model.parameters()).device).most
        written = (CHECKPOINTS, EXPORTED, GENERATION, HUGGINGFACE, ADAPTERS, REPORT)
        record["disk_bytes"] = sum(size_of(self.output / name) for name in written)
        file = self.output / "result.json"
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
