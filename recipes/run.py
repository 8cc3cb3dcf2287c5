"""Run the experiments of the paper, or any other: one JSON result for each row and seed.

    python recipes/run.py table1/gpt2                         # GPT-2 and the datasets of the hub
    python recipes/run.py table1/gpt2 --model DIR --text-dir DIR         # local ones
    python recipes/run.py table1/gpt2 --scale small           # the embedded model, no hub
    python -m aimet_quadapter report results -o report.html   # the tables and figures

A result is not measured again while its inputs are what they were.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from paper import experiment, methods, results
from paper.experiment import RunSpec
from paper.measure import Runner
from paper.model import Model
from paper.settings import ExperimentError, parse_changes

from aimet_quadapter import QuadapterError, check_disjoint, check_text
from aimet_quadapter.cli.terminal import any_terminal


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help="names, e.g. table1/gpt2, or 'all'")
    add("--list", action="store_true", help="list the experiments and their runs, measure nothing")
    add("--scale", choices=experiment.SCALES, default="paper", help="(%(default)s)")
    add("--model", help="hub name, folder, 'embedded', 'smollm2' (the experiment's)")
    add("--text-dir", type=Path, help="folder of local texts, see docs/data.md (the hub)")
    add("--finetune-texts", nargs="+", metavar="TEXT", help="(the experiment's)")
    add("--rows", nargs="+", metavar="ROW", help="these rows only (shell patterns)")
    add("--seeds", nargs="+", type=int, help="(the experiment's)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. qat.steps=100",
    )
    add("--results", type=Path, default=Path("results"), help="folder (%(default)s)")
    add(
        "--cache",
        type=Path,
        default=Path("build/recipes"),
        help="tokens, finished pairs, rounded modules, unfinished training",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[RunSpec]:
    """The runs that were asked for, their settings checked; --list takes all when none is."""
    changes = parse_changes(args.set)
    if args.model:
        changes["model"] = args.model
    if args.seeds:
        changes["seeds"] = args.seeds
    wanted = args.experiments or (["all"] if args.list else [])
    if wanted == ["all"]:
        wanted = experiment.names(slow=args.list)
    if not wanted:
        raise ExperimentError(f"name an experiment: {', '.join(experiment.names())}, or 'all'.")
    texts = args.finetune_texts
    runs = [r for name in wanted for r in experiment.specs(name, args.scale, changes, texts)]
    rows = args.rows or ["*"]
    runs = [r for r in runs if any(fnmatch.fnmatchcase(r.row, pattern) for pattern in rows)]
    if not runs:
        raise ExperimentError(f"no row is called {', '.join(rows)}.")
    return runs


def check_texts(run: RunSpec, text_dir: Path | None) -> None:
    """Every text is there, and what is measured on is not what was learned from."""
    settings = run.settings
    measured = settings["evaluation"]
    for text in settings["watch"]["texts"]:
        check_text(text, measured["split"], text_dir)
    learned = [(settings["calibration"]["text"], settings["calibration"]["split"])]
    learned += [(text, settings["finetuning"]["split"]) for text in run.finetune_texts]
    for name, split in learned:
        check_text(name, split, text_dir)
        for text in measured["texts"]:
            check_text(text, measured["split"], text_dir)
            check_disjoint((name, split), (text, measured["split"]))


def check_device(name: str) -> None:
    """Raise ExperimentError unless tensors can be put there."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ExperimentError(f"--device {name} cannot be used: {reason}") from e


def measure(args: argparse.Namespace, runs: Sequence[RunSpec]) -> None:
    """Measure what is not there yet, one line a run; all inputs are checked before the first."""
    models = {name: Model(name, args) for name in {r.settings["model"] for r in runs}}
    runners = [Runner(run, models[run.settings["model"]], args) for run in runs]
    for runner in runners:
        runner.data.check()
    found = results.read(args.results)
    files = [args.results / run.file for run in runs]
    there = [results.is_current(found.get(f), f, r) for f, r in zip(files, runners, strict=True)]
    known = {r["stamp"]["inputs"]: r for r in found.values() if "stamp" in r}
    for number, (runner, file, done) in enumerate(zip(runners, files, there, strict=True), 1):
        label = f"[{number}/{len(runs)}] {runner.run.file}"
        if done:
            print(f"{label}: there already", flush=True)
            continue
        same = known.get(runner.inputs)
        part = same or {"stamp": results.stamp(runner)} | runner.measure()
        result = part | runner.described()
        known[runner.inputs] = result
        results.write(file, result)
        runner.clear()
        scores = ", ".join(f"{t} {v:.2f}" for t, v in result["perplexity"].items())
        origin = f" (as {same['experiment']}, {same['row']})" if same else ""
        print(f"{label}: {scores}{origin}", flush=True)


@any_terminal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 2 when the input was wrong, which one line on stderr explains."""
    logging.getLogger("Quant").setLevel(logging.ERROR)
    args = arguments(argv)
    try:
        runs = chosen(args)
        if args.list:
            print("\n".join(r.file for r in runs))
            return 0
        check_device(args.device)
        for run in runs:
            methods.check(run.methods, bool(run.finetune_texts))
            check_texts(run, args.text_dir)
        measure(args, runs)
    except (ExperimentError, QuadapterError, ValueError, OSError) as error:
        print(f"run.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
