"""A file to which runs of a benchmark on several models are added, one beside the other."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from one_peer import Bench, arguments
from peers import ready

from aimet_quadapter import CalibrationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state, versions


def bench_of(about: str, file: Path) -> Bench:
    """What the command line names, as `peers.py` makes it.

    Args:
        about: the program's docstring.
        file: of the runs, if no other is named.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="embedded", help="local folder (embedded)")
    add("--layers", type=int, help="the first so many of them (all)")
    add("--name", default="embedded", help="of the model in the file")
    add("--output", type=Path, default=file, help="JSON file (%(default)s)")
    arguments(parser)
    args = parser.parse_args()
    logging.getLogger("Quant").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        args.model = ready(args.model, args.layers, Path(folder) / "model")
        return Bench(args)


def add_run(
    args: argparse.Namespace, config: CalibrationConfig, program: str, found: Mapping[str, Any]
) -> None:
    """Put what was found, and what made it, into the file.

    Args:
        args: of the bench.
        config: settings of phase 1.
        program: the benchmark's file.
        found: its figures by name.
    """
    record = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    gpu = [args.device] if args.device != "cpu" else []
    record[", ".join([args.name, f"W{args.bits[0]}A{args.bits[1]}", *gpu])] = {
        "layers": args.layers,
        "samples": args.samples,
        "length": args.length,
        "config file": args.config_file,
        "settings": config.to_dict(),
        **found,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state("aimet_quadapter", f"benchmarks/{program}", "benchmarks/one_peer.py"),
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")
