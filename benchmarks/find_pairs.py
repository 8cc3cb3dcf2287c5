"""Memory that `find_pairs` takes on a random Llama in half precision.

    python benchmarks/find_pairs.py --output benchmarks/results/cost/find_pairs.json

The proof computes in fp32, with one module's fp32 copy at a time: what it takes above the model
that is there already is what this shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from threading import Event, Thread

import torch
from aimet_torch import QuantizationSimModel
from transformers import LlamaConfig, LlamaForCausalLM

from aimet_quadapter import find_pairs, prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import versions

PAGE = 4096
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def resident() -> float:
    """Resident size of this process now, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = prepare(LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval())
    parameters = sum(p.numel() for p in model.parameters())
    sim = QuantizationSimModel(model, model.dummy_input(), in_place=True)
    gc.collect()
    before, seen, done = resident(), [resident()], Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(resident())

    watcher = Thread(target=watch)
    watcher.start()
    pairs = find_pairs(sim)
    done.set()
    watcher.join()
    largest = max(p.numel() for p in model.parameters())
    figures = {
        "parameters": parameters,
        "dtype": "bfloat16",
        "model_mib": round(parameters * 2 / 2**20, 1),
        "largest_module_fp32_mib": round(largest * 4 / 2**20, 1),
        "peak_above_model_mib": round(max(seen) - before, 1),
        "pairs": len(pairs),
        "shape": SHAPE,
        "seed": 0,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
