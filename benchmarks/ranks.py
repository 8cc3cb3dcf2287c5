"""Phase 1 on one rank and on two: what each learns, its seconds, and that α is the same to the bit.

    python benchmarks/ranks.py FOLDER --layers 6 --output benchmarks/results/cost/ranks.json

Ranks are processes of this machine with a thread each, on the CPU; seconds are those of a process,
so that work beside them counts less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import ready
from strangers import EMBEDDED

from aimet_quadapter import CalibrationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.model import load
from paper.record import git_state, versions

SIZES = (1, 2)
SAMPLES, LENGTH = 8, 512


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="embedded", help="local folder (embedded)")
    parser.add_argument("--layers", type=int, help="the first so many of them (all)")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        one_rank(args.model, args.rank_of)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = ready(args.model, args.layers, Path(folder) / "model")
        found = {str(size): ranks(model, size, Path(folder) / str(size)) for size in SIZES}
    alphas = {rank["alphas"] for of in found.values() for rank in of}
    record = {
        "model": Path(args.model).name,
        "layers": args.layers,
        "tokens": SAMPLES * LENGTH,
        "settings": CalibrationConfig().to_dict(),
        "ranks": found,
        "same to the bit": len(alphas) == 1,
        "seed": 0,
        "threads": 1,
        "versions": versions(),
        "git": git_state("aimet_quadapter", "benchmarks/ranks.py"),
    }
    print(
        json.dumps(record["ranks"], indent=1), f"the same to the bit: {record['same to the bit']}"
    )
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def ranks(model: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of so many ranks says."""
    folder.mkdir()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [f"--nproc-per-node={size}", __file__, model, "--rank-of", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run([*start, *program], check=True, env=environment)
    files = (folder / f"{rank}.json" for rank in range(size))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def one_rank(name: str, folder: Path) -> None:
    """Calibrate with the others, and write what this one did."""
    from aimet_torch import QuantizationSimModel

    from aimet_quadapter import calibrate, find_pairs, prepare, tokens
    from aimet_quadapter.learning.sharing import shared_out

    dist.init_process_group("gloo")
    hf, tokenizer = load(name)
    model = prepare(hf)
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73")
    text = (EMBEDDED / "calibration.txt").read_text(encoding="utf-8")
    samples = tokens(tokenizer, text, SAMPLES * LENGTH).view(SAMPLES, 1, LENGTH)
    pairs = find_pairs(sim, samples=samples, kinds=model.default_kinds)
    config = CalibrationConfig()
    begin = time.process_time()
    result = calibrate(sim, samples, pairs, config)
    seconds = time.process_time() - begin
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {pair.name for pair in shared_out(sim.model, result.pairs, config, size)[rank]}
    digest = hashlib.sha256()
    for one in result.results:
        digest.update(one.alpha.numpy().tobytes())
    told = {
        "pairs": len(own),
        "cpu_seconds": round(seconds, 1),
        "trials of all": result.choice.trials,
        "alphas": digest.hexdigest(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
