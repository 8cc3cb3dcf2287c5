"""What each part of phase 1 buys: its objective varied, one thing at a time, on one model.

    python recipes/ablation.py --text-dir DIR …   # all of decoder.py's arguments
    python recipes/ablation.py --variants layer block --bounds
    python recipes/ablation.py --variants --bounds   # of the sim as it is

Every variant learns on the same samples, for as many steps, from the best of the same starts; by
the divergence of the whole model on held-back samples they are compared, not chosen. `--bounds`
gives kinds of operations 16 bits, one after the other, with the first variant's α: what no better
scale of theirs could go below. So does a range for each channel of the residual stream, for scales
across it.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from operator import setitem
from typing import Any

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from decoder import Recipe, arguments
from torch import Tensor, nn

from aimet_quadapter import (
    CalibrationConfig,
    DataError,
    fold,
    set_norm_weight_bits,
    set_ranges,
    set_residual_bits,
    weights_restored,
)
from aimet_quadapter.cli.terminal import any_terminal
from aimet_quadapter.learning.analytic import evidence
from aimet_quadapter.learning.block_error import BlockError
from aimet_quadapter.learning.blocks import capture
from aimet_quadapter.learning.choice import held_back
from aimet_quadapter.learning.layer_error import LayerError
from aimet_quadapter.learning.layers import (
    Layer,
    Passed,
    capture_layers,
    layers_of,
    passed_on,
    take_up,
)
from aimet_quadapter.learning.learner import Learner, Objective, PairResult
from aimet_quadapter.pairs.pair import Pair, consumer_scale, producer_scales
from aimet_quadapter.sim.losses import EndLoss, cross_entropy
from aimet_quadapter.sim.ranges import placeholders
from aimet_quadapter.sim.samples import as_samples
from aimet_quadapter.sim.sites import set_output_bits, settings_restored

VARIANTS = ("layer", "block", "whole", "fisher", "quantized inputs", "across the nonlinearity")

AROUND = {"gate": False, "up": False, "down": True}
"""Part of an MLP → whether a scale of the nonlinearity divides its columns, or multiplies rows."""

BOUNDS = {
    "around the nonlinearity": ("*.gate_proj", "*.act", "*.up_proj", "*.mul", "*.c_fc"),
    "softmax": ("*.softmax",),
    "scores": ("*.qk", "*.scale_scores", "*.add_mask"),
    "queries, keys": ("*.q_proj", "*.k_proj", "*.rotary_*"),
    "values": ("*.v_proj", "*.av"),
    "norms": ("*norm",),
    "head": ("lm_head",),
}


class WholeError(LayerError):
    """‖ŷ − y‖² / ‖y‖² over all tokens: large tokens count most."""

    def size(self, index: int, error: Tensor, tokens: Tensor) -> Tensor:
        return error.square().mean() / self.targets[index].square().mean()


class FisherError(LayerError):
    """Σ g² (ŷ − y)², g the gradient of the unquantized loss at y: its curvature (BRECQ)."""

    def __init__(
        self, layer: Layer, config: CalibrationConfig, gradients: Sequence[Tensor]
    ) -> None:
        super().__init__(layer, config)
        self.curvatures = [g.square() / g.square().mean() for g in gradients]

    def size(self, index: int, error: Tensor, tokens: Tensor) -> Tensor:
        weighted = self.curvatures[index][tokens] * error.square()
        return weighted.mean() / self.targets[index].square().mean()


class Ablation:
    """A recipe's model, sim, pairs and samples, and what is learned of them by each variant."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = recipe.sim.model
        args = recipe.args
        self.config = CalibrationConfig(
            steps=args.steps, lr=args.lr, seed=args.seed, choice="block"
        )
        samples = as_samples(recipe.samples, self.model)
        self.fitted, self.held = held_back(samples)
        self.evidence = evidence(self.model, recipe.pairs, self.fitted)
        self.end_loss = EndLoss(self.model, self.held)
        self.variants: dict[str, Callable[[], Iterator[Objective]]] = {
            "block": self.blocks,
            "layer": lambda: self.layers(lambda layer: LayerError(layer, self.config)),
            "whole": lambda: self.layers(lambda layer: WholeError(layer, self.config)),
            "fisher": self.fisher,
            "quantized inputs": self.quantized_inputs,
            "across the nonlinearity": self.across_nonlinearity,
        }
        self.inexact: list[Pair] = []

    def blocks(self, pairs: Sequence[Any] | None = None) -> Iterator[Objective]:
        """Each pair on its own block, as the paper."""
        chosen = self.recipe.pairs if pairs is None else pairs
        for group in capture(self.recipe.sim, chosen, self.fitted, self.config.capture_bytes):
            for block in group:
                yield BlockError(block, self.config)

    def layers(self, error: Callable[[Layer], Objective]) -> Iterator[Objective]:
        """All pairs of a layer together; those of no layer on their blocks."""
        found = layers_of(self.model, self.recipe.pairs)
        inside = {p.name for pairs in found.values() for p in pairs}
        for group in capture_layers(self.recipe.sim, found, self.fitted, self.config.capture_bytes):
            for layer in group:
                yield error(layer)
        yield from self.blocks([p for p in self.recipe.pairs if p.name not in inside])

    def fisher(self) -> Iterator[Objective]:
        """Weighted by the curvature of the loss."""
        names = layers_of(self.model, self.recipe.pairs)
        gradients: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str, _: Any, __: Any, y: Tensor) -> None:
            y.register_hook(lambda g: gradients[name].append(g.detach().flatten(0, -2)))

        with ExitStack() as stack:
            for name in names:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_hook(partial(keep, name)).remove)
            stack.enter_context(remove_all_quantizers(self.model))
            stack.enter_context(in_eval_mode(self.model))
            for sample in self.fitted:
                cross_entropy(self.model, sample).backward()
                self.model.zero_grad(set_to_none=True)
        return self.layers(lambda layer: FisherError(layer, self.config, gradients[layer.name]))

    def quantized_inputs(self) -> Iterator[Objective]:
        """What a layer reads is what the quantized layers before it gave; y stays as it is."""
        passed: list[Passed] = []

        def error(layer: Layer) -> Objective:
            if passed:
                take_up(layer, passed)
            return LayerError(layer, self.config)

        for found in self.layers(error):
            yield found  # learned before the next is asked for
            if isinstance(found, LayerError):
                alphas = {p.name: self.learned[p.name] for p in found.pairs}
                passed = passed_on(found.layer, alphas)

    def across_nonlinearity(self) -> Iterator[Objective]:
        """The layers' α, then, layer by layer, a scale before the nonlinearity and one behind it.

        Not exact: f(A z) B ≠ f(z) where f is no ReLU. Bounded by the layer's own error, which is
        that from the unquantized layer: what changes that layer by more than it mends is not kept.
        """
        for found in self.layers(lambda layer: LayerError(layer, self.config)):
            yield found
            if isinstance(found, LayerError):
                added = around_nonlinearity(self.model, found.layer)
                self.inexact += added
                self.learned |= self.beside(found.layer, added)

    def beside(self, layer: Layer, added: Sequence[Pair]) -> dict[str, Tensor]:
        """Scales of added pairs that lower a layer's error most, its α left as learned."""
        fixed = torch.cat([self.learned[p.name] for p in layer.pairs])
        error = LayerError(replace(layer, pairs=(*layer.pairs, *added)), self.config)
        logs = torch.zeros(sum(p.channels for p in added), requires_grad=True)
        best = logs.detach().exp()
        least, extremes = error.on_held_back(torch.cat((fixed, best)))
        optimizer = torch.optim.Adam([logs], lr=self.config.lr / 3)  # they leave the function
        unit = least
        for step in range(1, self.config.steps + 1):
            loss = error.on_trained(step, torch.cat((fixed, logs.exp())), extremes)
            (logs.grad,) = torch.autograd.grad(loss / unit, [logs])
            optimizer.step()
            if step % self.config.evaluate_every == 0 or step == self.config.steps:
                now = logs.detach().exp()
                held, _ = error.on_held_back(torch.cat((fixed, now)))
                if held < least:
                    least, best = held, now
        print(f"{layer.name}: {least / unit:.3f} times the held-back error", flush=True)
        parts = best.split([p.channels for p in added])
        return {p.name: part for p, part in zip(added, parts, strict=True)}

    def learn(self, variant: str) -> dict[str, Tensor]:
        """α of every pair by a variant."""
        self.learned: dict[str, Tensor] = {}
        self.inexact = []
        results: list[PairResult] = []
        with placeholders(self.recipe.sim.quantizers()), in_eval_mode(self.model):
            for error in self.variants[variant]():
                results = Learner(error, self.model, self.evidence, self.config).learn()
                self.learned |= {r.pair.name: r.alpha for r in results}
        return self.learned

    def bounds(self) -> dict[str, float]:
        """What is changed → divergence; where nothing is, first."""
        sim, model = self.recipe.sim, self.model
        sums, writers = model.residual_sums, model.residual_writers
        stream = {"the stream: sums": sums, "the stream: sums, writers": (*sums, *writers)}
        found = {"nothing": self.end_loss()}

        def note(name: str) -> None:
            set_ranges(sim, self.recipe.range_samples)
            found[name] = self.end_loss()
            print(f"{name:<60}{found[name]:9.4f}", flush=True)

        for name, patterns in (stream | BOUNDS).items():
            with settings_restored(list(sim.quantizers())):
                if set_output_bits(sim, patterns, 16):
                    note(f"{name}, 16 bits")
        with settings_restored(list(sim.quantizers())):
            set_norm_weight_bits(sim, 16)
            note("weights of norms, 16 bits")
        with by_channel(sim, (*sums, *writers)):
            note("the stream: sums and norms before them, a range for each channel")
        return found


def around_nonlinearity(model: Any, layer: Layer) -> list[Pair]:
    """A pair of scales for a layer's MLP that no proof would pass: gate × a, down / b."""
    index = int(layer.name.rpartition(".")[2])
    parts = model.description.layers[index].parts
    found = []
    for part, divide in AROUND.items():
        if part not in parts or (part == "up" and "gate" in parts):  # up → down is a pair, exact
            continue
        name = f"{layer.name}.{parts[part]}"
        module = model.get_submodule(name)
        channels = module.in_features if divide else module.out_features
        every = torch.arange(channels)
        scales = [consumer_scale(name, module, every)] if divide else []
        scales = scales or list(producer_scales(name, module, every))
        found.append(Pair("up-down", f"around {name}", (), channels, tuple(scales), (), (), ()))
    return found


@contextmanager
def by_channel(sim: Any, patterns: Sequence[str]) -> Iterator[None]:
    """Give outputs a range for each channel; not of linears, which AIMET has no such ranges for."""
    with ExitStack() as stack:
        for name, module in sim.named_qmodules():
            one = module.output_quantizers[0]
            if one is None or isinstance(module, nn.Linear):
                continue
            if any(fnmatch.fnmatchcase(name, p) for p in patterns):
                stack.callback(setitem, module.output_quantizers, 0, one)
                channels = (sim.model.part("head").in_features,)
                module.output_quantizers[0] = QuantizeDequantize(
                    channels, one.bitwidth, one.symmetric
                )
        yield


def _more(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, help="(all)")
    add("--bounds", action="store_true", help="what 16 bits, or ranges by channel, would buy")
    parser.set_defaults(residual=[8], methods=[])


@any_terminal()
def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    logging.getLogger("Quant").setLevel(logging.ERROR)
    args = arguments(argv, _more)
    if len(args.residual) != 1:
        sys.exit(f"ablation.py: error: --residual {args.residual}: give one width")
    try:
        recipe = Recipe(args)
    except DataError as error:
        sys.exit(f"ablation.py: error: {error}")
    (bits,) = args.residual
    set_residual_bits(recipe.sim, bits)
    ablation = Ablation(recipe)
    divergences, seconds, bounds = {}, {}, {}
    for variant in ("ones", *args.variants):
        begin = time.perf_counter()
        ones = {p.name: torch.ones(p.channels) for p in recipe.pairs}
        alphas = ones if variant == "ones" else ablation.learn(variant)
        seconds[variant] = round(time.perf_counter() - begin, 1)
        with weights_restored(recipe.sim, recipe.every):
            fold(recipe.sim, [*recipe.pairs, *ablation.inexact], alphas)
            set_ranges(recipe.sim, recipe.range_samples)
            divergences[variant] = ablation.end_loss()
            print(f"{variant}: {divergences[variant]:.4f} in {seconds[variant]:.0f} s", flush=True)
            recipe.rows.append(recipe.row(variant, bits, recipe.sim))
            if args.bounds and variant == (*args.variants, "ones")[0]:
                bounds = ablation.bounds()
        recipe.save(divergence=divergences, learning=seconds, bounds=bounds)


if __name__ == "__main__":
    main()
