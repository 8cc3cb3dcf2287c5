"""How the error of each pair falls in phase 1, for what stopping early would save and cost.

    python benchmarks/early_stop.py                                # the embedded model, W8A8
    python benchmarks/early_stop.py FOLDER --layers 8 --bits 4 16  # a model's first layers

The conditions are those of `peers.py`; nothing is stopped here. A run is added to the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from one_peer import Bench, arguments
from peers import ready

from aimet_quadapter import CalibrationConfig, calibrate, find_pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state, versions

FILE = Path(__file__).parent / "results" / "cost" / "early_stop.json"


def main() -> None:
    """Learn all pairs of a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="embedded", help="local folder (embedded)")
    add("--layers", type=int, help="the first so many of them (all)")
    add("--name", default="embedded", help="of the model in the file")
    add("--output", type=Path, default=FILE, help="JSON file (%(default)s)")
    arguments(parser)
    args = parser.parse_args()
    logging.getLogger("Quant").setLevel(logging.ERROR)
    config = CalibrationConfig(choice="block")
    with tempfile.TemporaryDirectory() as folder:
        args.model = ready(args.model, args.layers, Path(folder) / "model")
        bench = Bench(args)
        sim = bench.sim()
        found = calibrate(sim, bench.samples, find_pairs(sim, samples=bench.samples), config)
    record = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    record[f"{args.name}, W{args.bits[0]}A{args.bits[1]}"] = {
        "layers": args.layers,
        "samples": args.samples,
        "length": args.length,
        "config file": args.config_file,
        "settings": config.to_dict(),
        "pairs": [
            {
                "pair": result.pair.name,
                "kind": result.pair.kind,
                "curve": result.curve,
                "seconds": result.seconds,
            }
            for result in found.results
        ],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state("aimet_quadapter", "benchmarks/early_stop.py", "benchmarks/one_peer.py"),
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
