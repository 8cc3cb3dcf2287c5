"""One method of quantizing a model, once: time, memory, and what the model loses.

Run by `benchmarks/peers.py`, one process a measurement.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import patch_attr
from strangers import EMBEDDED
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from aimet_quadapter import (
    DataError,
    LogitsOnly,
    analytic_alphas,
    apply_quadapter,
    find_pairs,
    finetune,
    fold,
    keep_module_sites,
    perplexity,
    prepare,
    prompt_prefix,
    set_norm_weight_bits,
    set_ranges,
    set_table_bits,
    tokens,
)
from aimet_quadapter.cli.machine import Memory
from aimet_quadapter.cli.settings import TIERS, resolve
from aimet_quadapter.learning.block_error import BlockError
from aimet_quadapter.sim import ranges

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.model import load
from paper.record import versions

TABLE_BITS = 8
"""Of the embedding's and the head's weights, where others have less."""


class Bench:
    """What every method works on, and the time and memory that it takes.

    Attributes:
        hf: the HuggingFace model.
        samples: to calibrate on, (1, T) each.
        ids: tokens to evaluate on.
        prefix: what a prompt begins with.
        seconds, cpu_seconds: of what was measured, by the clock and of this process on all cores.
        before, peak: memory when that began, and at most, bytes.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args = args
        self.hf, tokenizer = load(args.model)
        self.hf.to(args.device)
        self.prefix = prompt_prefix(tokenizer)
        length = args.length - len(self.prefix)
        text = args.calibration_text.read_text(encoding="utf-8")
        ids = tokens(tokenizer, text, args.samples * length)
        if len(ids) < args.samples * length:
            raise DataError(
                f"{args.calibration_text} has {len(ids)} tokens; {args.samples} samples of "
                f"{length} are asked for. Take fewer, or a longer text."
            )
        rows = ids.view(args.samples, 1, length)
        self.samples = [torch.cat((self.prefix[None], row), 1).to(args.device) for row in rows]
        text = args.evaluation_text.read_text(encoding="utf-8")
        self.ids = tokens(tokenizer, text, args.eval_tokens)
        self.seconds = self.cpu_seconds = 0.0
        self.before = self.peak = 0

    def sim(self) -> Any:
        """The prepared model with AIMET's own quantizer sites."""
        model = prepare(self.hf)
        sim = self.quantized(model, model.dummy_input())
        keep_module_sites(sim)
        if self.args.bits[0] < TABLE_BITS:
            set_table_bits(sim, TABLE_BITS)
        set_norm_weight_bits(sim, max(self.args.bits))
        return sim

    def stock_sim(self) -> Any:
        """The HuggingFace model itself; the bits are those of `sim`."""
        model: Any = LogitsOnly(self.hf)
        model.device = self.hf.device  # OmniQuant asks for that
        sim = self.quantized(model, self.samples[0])
        for name, module in sim.named_qmodules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) or name.endswith("lm_head"):
                module.param_quantizers["weight"].bitwidth = max(self.args.bits[0], TABLE_BITS)
            elif weight is not None and weight.dim() == 1:  # of a norm
                module.param_quantizers["weight"].bitwidth = max(self.args.bits)
        return sim

    def quantized(self, model: nn.Module, inputs: Any) -> Any:
        """A sim of any model; it becomes the sim's own."""
        weights, activations = self.args.bits
        return QuantizationSimModel(
            model,
            inputs,
            default_output_bw=activations,
            default_param_bw=weights,
            config_file=self.args.config_file,
            in_place=True,
        )

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time and see the memory of what a method does."""
        device = next(self.hf.parameters()).device
        with Memory(device).watched() as peak:
            begin, cpu = time.perf_counter(), time.process_time()
            yield
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin
            self.cpu_seconds += time.process_time() - cpu
        self.before = self.before or peak.before
        self.peak = max(self.peak, peak.most)

    def window_rows(self) -> Iterator[Tensor]:
        """The evaluation's windows, (1, T)."""
        for row in self.ids.split(self.args.length - len(self.prefix)):
            yield torch.cat((self.prefix, row))[None].to(self.args.device)


def fp(bench: Bench) -> Any:
    """No quantizer at all."""
    return prepare(bench.hf)


def ptq(bench: Bench, make: Callable[[Bench], Any] = Bench.sim) -> Any:
    """Ranges alone; of OmniQuant's sim they are what it is to be compared with."""
    sim = make(bench)
    with bench.measured():
        set_ranges(sim, bench.samples)
    return sim


def analytic(bench: Bench, method: str) -> Any:
    """A formula's scales on our pairs: AIMET's own CLE changes nothing on a transformer."""
    sim = bench.sim()
    with bench.measured():
        pairs = find_pairs(sim, samples=bench.samples)
        fold(sim, pairs, analytic_alphas(sim, bench.samples, pairs, method))
        set_ranges(sim, bench.samples)
    return sim


def quadapter(
    bench: Bench, tier: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Any:
    """Phase 1, and phase 2 where the tier has it; never on more than the common samples."""
    settings = resolve({"tier": tier})
    sim, samples = bench.sim(), bench.samples[: settings.samples]
    with bench.measured(), around():
        found = apply_quadapter(sim, samples, calibration=settings.calibration)
        if settings.phase_2:
            pairs = find_pairs(sim, kinds={pair.kind for pair in found.pairs})
            finetune(sim, samples, pairs, config=settings.finetuning)
            fold(sim)
    return sim


def compiled() -> AbstractContextManager[Any]:
    """The fake quantization of phase 1, with its gradient, made one kernel by `torch.compile`."""
    function = ranges._BatchQuantizeDequantize

    def quantized(x: Tensor, qmin: int, qmax: int, symmetric: bool) -> Any:
        return apply(x, qmin, qmax, symmetric)

    apply = function.apply
    return patch_attr(function, "apply", torch.compile(quantized, dynamic=True))


def bfloat16() -> AbstractContextManager[Any]:
    """Matrix products of the steps in bf16; comparisons stay as they are."""
    exact = BlockError.on_trained

    def on_trained(error: BlockError, *args: Any) -> Tensor:
        with torch.autocast(error.device.type, torch.bfloat16):
            return exact(error, *args)

    return patch_attr(BlockError, "on_trained", on_trained)


def weights_learned(
    bench: Bench, learn: Callable[[Any, list[Tensor]], None], tier: str | None = None
) -> Any:
    """What AIMET does for weights by themselves; behind phase 1 of a tier where one is named."""
    sim, samples = bench.sim(), bench.samples
    with bench.measured():
        if tier:
            settings = resolve({"tier": tier})
            samples = samples[: settings.samples]
            apply_quadapter(sim, samples, calibration=settings.calibration)
        learn(sim, samples)
        set_ranges(sim, samples)
    return sim


def seqmse(sim: Any, samples: list[Tensor]) -> None:
    """AIMET's search for the ranges of weights of at most 4 bits, the head's left out."""
    from aimet_torch.seq_mse import apply_seq_mse

    apply_seq_mse(sim, samples, modules_to_exclude=[sim.model.part("head")])


def adascale(sim: Any, samples: list[Tensor], iterations: int) -> None:
    """AIMET's learned scales and rounding of weights."""
    from aimet_torch.adascale import apply_adascale

    apply_adascale(sim, samples, num_iterations=iterations)


def spinquant(bench: Bench) -> Any:
    """AIMET's Hadamard rotations of the stream and of the heads, in the HuggingFace model."""
    from aimet_torch.spinquant import apply_spinquant

    head = bench.hf.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())  # it wants it untied
    bench.hf.config.tie_word_embeddings = False
    with bench.measured():
        apply_spinquant(bench.hf, enable_r1=True, enable_r2=True)
    sim = bench.sim()
    with bench.measured():
        set_ranges(sim, bench.samples)
    return sim


def omniquant(bench: Bench, iterations: int) -> Any:
    """AIMET's OmniQuant, which takes HuggingFace's own classes alone."""
    from aimet_torch.experimental.omniquant import apply_omniquant

    sim = bench.stock_sim()
    with bench.measured(), tempfile.TemporaryDirectory() as folder:
        apply_omniquant(
            sim, bench.samples, lambda m, x: m(x), num_iterations=iterations, output_path=folder
        )
        set_ranges(sim, bench.samples)
    return sim


METHODS: dict[str, Callable[[Bench], Any]] = {
    "fp": fp,
    "ptq": ptq,
    "cle": partial(analytic, method="cle"),
    "smoothquant": partial(analytic, method="smoothquant"),
    **{f"quadapter {tier}": partial(quadapter, tier=tier) for tier in TIERS if tier != "paper"},
    "seqmse": partial(weights_learned, learn=seqmse),
    "adascale 100": partial(weights_learned, learn=partial(adascale, iterations=100)),
    "adascale 1500": partial(weights_learned, learn=partial(adascale, iterations=1500)),
    "quadapter fast, seqmse": partial(weights_learned, learn=seqmse, tier="fast"),
    "quadapter fast, adascale 100": partial(
        weights_learned, learn=partial(adascale, iterations=100), tier="fast"
    ),
    "spinquant": spinquant,
    "ptq, omniquant's sim": partial(ptq, make=Bench.stock_sim),
    "omniquant 100": partial(omniquant, iterations=100),
    "omniquant 800": partial(omniquant, iterations=800),
}
"""Name → what makes a sim of a bench; a number is that of the iterations of a block."""

VARIANTS: dict[str, Callable[[Bench], Any]] = {
    "quadapter fast, compiled": partial(quadapter, tier="fast", around=compiled),
    "quadapter fast, bfloat16": partial(quadapter, tier="fast", around=bfloat16),
}
"""What may make phase 1 faster, and is not in it."""


@torch.no_grad()
def divergence(bench: Bench, quantized: nn.Module) -> float:
    """Mean over the tokens of KL(p ‖ q), p the unquantized model's as it was loaded."""
    original, _ = load(bench.args.model)
    original.to(bench.args.device)
    total, count = 0.0, 0
    for row in bench.window_rows():
        p, q = (
            log_softmax(logits(model, row)[0, len(bench.prefix) :].float(), -1)
            for model in (original, quantized)
        )
        total += float(kl_div(q, p, reduction="sum", log_target=True))
        count += len(p)
    return total / count


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of a HuggingFace model or any other, (B, T, V)."""
    out = model(ids)
    return out if isinstance(out, Tensor) else out[0]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What a measurement and all of them together are given."""
    add = parser.add_argument
    add("--bits", type=int, nargs=2, default=[8, 8], metavar=("WEIGHTS", "ACTIVATIONS"))
    add("--samples", type=int, default=8, help="to calibrate on")
    add("--length", type=int, default=512, help="tokens of a sample and of a window")
    add("--eval-tokens", type=int, default=4096)
    add("--calibration-text", type=Path, default=EMBEDDED / "calibration.txt", help="UTF-8 file")
    add("--evaluation-text", type=Path, default=EMBEDDED / "heldout.txt", help="UTF-8 file")
    add("--config-file", default="default", help="AIMET config file or alias (%(default)s)")
    add("--device", default="cpu")


def main() -> None:
    """Measure one method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="local folder, or embedded")
    parser.add_argument("method", choices=METHODS | VARIANTS)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to be written")
    arguments(parser)
    args = parser.parse_args()
    logging.getLogger("Quant").setLevel(logging.ERROR)
    bench = Bench(args)
    sim = (METHODS | VARIANTS)[args.method](bench)
    model = getattr(sim, "model", sim) if args.method != "fp" else sim
    result = {
        "seconds": bench.seconds,
        "cpu_seconds": bench.cpu_seconds,
        "before_bytes": bench.before,
        "peak_bytes": bench.peak,
        "perplexity": perplexity(sim, bench.ids, args.length, prefix=bench.prefix, progress=False),
        "divergence": divergence(bench, model),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
