"""Quadapter beside the methods that a user would pick instead: time, memory, what the model loses.

    python benchmarks/peers.py                              # the embedded model, W8A8
    python benchmarks/peers.py ./smollm2 --layers 3 --bits 4 16 --turns 2
    python benchmarks/peers.py llama-3.2-1b --device cuda   # that shape with random weights

Every method has the same model, samples, text and bits, at the quantizer sites that AIMET has by
itself, and a process of its own each time. They take turns (A B C A B C), and a ratio is that of
two in the same turn. Time and memory are those of calibration: loading, preparing, making a sim and
evaluating are in neither; seconds are those of the clock and of the process on all cores, which
with OMP_NUM_THREADS=1 are the same on an idle machine. With --strangers, llm-compressor and
auto-round run by the Python of their own environment (docs/quantizers.md); their perplexity is of
their own quantized model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from one_peer import METHODS, VARIANTS, arguments
from strangers import EMBEDDED, PROGRAMS, sha256

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.model import shortened
from paper.record import git_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers"
CODE = ("aimet_quadapter", "benchmarks/peers.py", "benchmarks/one_peer.py", "tests/strangers")
BASE = "quadapter default"
"""What the others are divided by."""

COSTS = ("seconds", "cpu_seconds", "peak_bytes")

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
}
"""Models with random weights: what they lose says nothing, what they cost does."""


def main() -> None:
    """Measure all methods, turn by turn."""
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        model = ready(args.model, args.layers, Path(folder) / "model")
        turns: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        for turn in range(args.turns):
            turns.append({})
            for method in args.methods:
                if method not in failed:
                    found = measured(method, model, args)
                    kept: dict[str, Any] = failed if isinstance(found, str) else turns[turn]
                    kept[method] = found
                    print(f"{method:<30}{found if isinstance(found, str) else line(found)}")
    record = {
        "model": args.name,
        "layers": args.layers,
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, (int, str, list))}
        | {"model": Path(args.model).name},
        "sha256": {
            "calibration text": sha256(args.calibration_text),
            "evaluation text": sha256(args.evaluation_text),
        },
        "summary": {m: summary(m, turns) for m in args.methods if m not in failed},
        "does not run": failed,
        "turns": turns,
        "stamp": stamp(),
    }
    weights, activations = args.bits
    file = args.output / f"{args.name}_w{weights}a{activations}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file}")


def options() -> argparse.Namespace:
    """What is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", nargs="?", default="embedded", help=f"local folder, embedded, or {[*SHAPES]}")
    add("--layers", type=int, help="the first so many of them (all)")
    add("--name", help="of the model in the results (its folder's)")
    names = [*METHODS, *VARIANTS, *PROGRAMS]
    add("--methods", nargs="+", choices=names, default=quick_ones(), metavar="NAME")
    add("--turns", type=int, default=2)
    add("--strangers", type=Path, help="Python with llm-compressor and auto-round")
    add("--output", type=Path, default=RESULTS, help="folder (%(default)s)")
    arguments(parser)
    args = parser.parse_args()
    args.name = args.name or f"{Path(args.model).name}{f'_{args.layers}' if args.layers else ''}"
    if args.strangers:
        args.methods = list(dict.fromkeys([*args.methods, *PROGRAMS]))
    return args


def quick_ones() -> list[str]:
    """All methods but those whose iterations take an hour on two cores."""
    return [m for m in METHODS if not m.endswith(("1500", "800"))]


def ready(model: str, layers: int | None, folder: Path) -> str:
    """Embedded as it is; else a folder, of a cut or a random model a new one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    if model in SHAPES:
        torch.manual_seed(0)
        shape = SHAPES[model] | ({"num_hidden_layers": layers} if layers else {})
        config = LlamaConfig(**shape)
        source, made = str(EMBEDDED), AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    elif layers is None:
        return model if model == "embedded" else str(Path(model).absolute())
    else:
        source = str(EMBEDDED) if model == "embedded" else model
        made = AutoModelForCausalLM.from_pretrained(
            source, config=shortened(source, layers), dtype=torch.float32
        )
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def measured(method: str, model: str, args: argparse.Namespace) -> dict[str, Any] | str:
    """One method in a process of its own; what it found, or the last line of why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command: list[str | Path]
        weights, activations = args.bits
        if method in PROGRAMS:
            source = str(EMBEDDED) if model == "embedded" else model
            command = [args.strangers.absolute(), PROGRAMS[method], source]
            command += ["--scheme", f"w{weights}a{activations}"]
        else:
            command = [sys.executable, ROOT / "benchmarks" / "one_peer.py", model, method]
            command += ["--bits", str(weights), str(activations), "--device", args.device]
            command += ["--config-file", args.config_file]
        for name in ("calibration_text", "evaluation_text", "samples", "length", "eval_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        hidden = {"PYTHONPATH"} if method in PROGRAMS else set()
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        done = subprocess.run(
            [*command, "--result", result],
            capture_output=True,
            text=True,
            env=environment | {"TQDM_DISABLE": "1"},
            cwd=folder,
        )
        if done.returncode:
            return reason(done.stderr)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found if method not in PROGRAMS else found | {"perplexity": found["quantized"]}


def reason(log: str) -> str:
    """The line of an error in what a program wrote, or the last one."""
    lines = log.strip().splitlines()
    return next(
        (x for x in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", x)), lines[-1]
    )


def summary(method: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of a method, and its ratios to `BASE` in the same turn with their spread."""
    own = [turn[method] for turn in turns]
    found: dict[str, Any] = {
        key: statistics.median(one[key] for one in own)
        for key in (*COSTS, "perplexity", "divergence")
        if key in own[0]
    }
    for key in COSTS:
        ratios = [turn[method][key] / turn[BASE][key] for turn in turns if BASE in turn]
        if ratios and key in own[0]:
            found[f"{key} over {BASE}"] = {
                "median": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
    return found


def line(found: Mapping[str, Any]) -> str:
    """A measurement as it is printed."""
    words = f"{found['seconds']:8.1f} s {found['cpu_seconds']:8.1f} s of cores"
    words += f" {found['peak_bytes'] / 2**30:6.2f} GiB"
    kl = f", KL {found['divergence']:.4f}" if "divergence" in found else ""
    return f"{words}   perplexity {found['perplexity']:.5g}{kl}"


def stamp() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    return {
        "git": git_state(*CODE),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "seed": 0,
        "load_average": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    main()
