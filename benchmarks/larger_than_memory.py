"""Phase 1 on a model that stays on disk: memory of each stage, beside what it should take.

    python benchmarks/larger_than_memory.py --output benchmarks/results/cost/larger_than_memory.json

A random Llama in bf16 is written shard by shard, and mapped from there: load, prepare, sim,
find_pairs, calibrate, in a process of its own. Two kinds of memory are noted: the process's own,
which it must have, and pages of the checkpoint, which the system drops when it wants others.
`--resident` drops them as soon as both together are more than that, so that the process never
holds the model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import versions

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "choice": "block",
    "steps": 1,
    "start": "smoothquant",
    "keep_best": False,
    "evaluate_every": 1,
    "capture_bytes": 64 << 20,
}
"""One step, compared with its start alone: memory is that of any step."""

SAMPLES, LENGTH = 1, 64
SHARD = 400 << 20
OUTLIERS = 4
"""Channels of each norm that are large, so that there is something to learn."""

PAGEOUT = 21
"""`MADV_PAGEOUT` of Linux: give these pages back; what was written to them stays."""

MIB = 2**20


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A random Llama as a sharded checkpoint, one shard in memory at a time."""
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for number, (name, size) in enumerate(shapes.items(), 1):
        shard[name] = _random(size, generator)
        held = sum(x.nbytes for x in shard.values())
        if held > SHARD or number == len(shapes):
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:  # a norm
        weight = 1 + 0.1 * torch.randn(size, generator=generator)
        weight[torch.randperm(size[0], generator=generator)[:OUTLIERS]] *= 40
        return weight.bfloat16()
    rows = [torch.randn(part, size[1], generator=generator) for part in _parts(size[0])]
    return torch.cat([(0.02 * x).bfloat16() for x in rows])


def _parts(rows: int, most: int = 8192) -> list[int]:
    return [min(most, rows - begin) for begin in range(0, rows, most)]


def memory() -> dict[str, float]:
    """This process's own memory, and pages of files in it, MiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kinds = ("Anon", "File")
    own, files = (int(re.findall(rf"Rss{kind}:\s+(\d+)", status)[0]) / 1024 for kind in kinds)
    return {"own": own, "files": files, "all": own + files}


class Watch:
    """The largest memory of each stage, looked at every few milliseconds.

    Args:
        folder: of the checkpoint.
        resident: MiB above which pages of the checkpoint are given back; None leaves it to the
            system.
    """

    def __init__(self, folder: Path, resident: float | None) -> None:
        self.folder = folder
        self.resident = resident
        self.stages: dict[str, dict[str, float]] = {}
        self.stage = ""
        self.given_back = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Watch what the context takes."""
        self.stages[stage] = memory()
        done, begin = Event(), time.perf_counter()
        watcher = Thread(target=self._look, args=(stage, done))
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        self.stages[stage]["seconds"] = time.perf_counter() - begin
        print(stage, {k: round(v) for k, v in self.stages[stage].items()}, flush=True)

    def _look(self, stage: str, done: Event) -> None:
        peaks = self.stages[stage]
        while not done.wait(0.01):
            now = memory()
            peaks |= {kind: max(now[kind], peaks[kind]) for kind in now}
            if self.resident is not None and now["all"] > self.resident:
                self._give_back()

    def _give_back(self) -> None:
        self.given_back += 1
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if str(self.folder) in line:
                begin, end = (int(x, 16) for x in line.split()[0].split("-"))
                madvise(begin, end - begin, PAGEOUT)


def measure(folder: Path, resident: float | None) -> dict[str, Any]:
    """Phase 1 on a checkpoint: memory and seconds of each stage, MiB."""
    from aimet_torch import QuantizationSimModel

    from aimet_quadapter import CalibrationConfig, calibrate, find_pairs, prepare
    from aimet_quadapter.learning import calibration  # noqa: F401  with its imports

    watch, imported = Watch(folder, resident), memory()
    with watch.timed("load"):
        hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with watch.timed("prepare"):
        model = prepare(hf_model, share=True)
    with watch.timed("sim"):
        sim = QuantizationSimModel(model, model.dummy_input(), in_place=True, config_file="htp_v73")
    with watch.timed("find_pairs"):
        pairs = find_pairs(sim)
    shape = (SAMPLES, 1, LENGTH)
    generator = torch.Generator().manual_seed(0)
    samples = list(torch.randint(0, model.config.vocab_size, shape, generator=generator))
    with watch.timed("calibrate"):
        result = calibrate(sim, samples, pairs, CalibrationConfig(**SETTINGS))
    peak = {k: max(stage[k] for stage in watch.stages.values()) for k in imported}
    return {
        **sizes(hf_model),
        "pairs": pairs.counts(),
        "error_to_ones": result.error_ratio(),
        "imported_mib": imported,
        "stages_mib": watch.stages,
        "peak_mib": peak,
        "peak_above_imports_mib": {k: peak[k] - imported[k] for k in peak},
        "pages_given_back": watch.given_back,
    }


def sizes(model: Any) -> dict[str, Any]:
    """Parameters, bytes, and what calibration should take at most, MiB."""

    def mib(part: str) -> float:
        return sum(p.nbytes for n, p in model.named_parameters() if part in n) / MIB

    parts = {"embedding": mib("embed_tokens"), "head": mib("lm_head"), "block": mib("layers.0.")}
    weights = parts["embedding"] + parts["head"] + 2 * parts["block"]
    budget = SETTINGS["capture_bytes"] / MIB
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_mib": mib(""),
        "parts_mib": parts,
        "bound_mib": weights + budget,
        "bound_in_float32_mib": 2 * weights + budget,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--resident", type=float, help="MiB the process may hold")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--measure", type=Path, help="a checkpoint; writes none")
    args = parser.parse_args()
    if args.measure:
        figures = measure(args.measure.resolve(), args.resident)
        args.output.write_text(json.dumps(figures), encoding="utf-8")
        return
    shape = SHAPE | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        report = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--measure", folder, "--output", str(report)]
        command += ["--resident", str(args.resident)] if args.resident else []
        subprocess.run(command, check=True)
        figures = json.loads(report.read_text(encoding="utf-8"), parse_float=_rounded)
    figures |= {
        "dtype": "bfloat16",
        "resident_mib": args.resident,
        "shape": shape,
        "settings": SETTINGS,
        "samples": [SAMPLES, LENGTH],
        "seed": 0,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _rounded(number: str) -> float:
    return round(float(number), 3)


if __name__ == "__main__":
    main()
