"""Learning the blocks of one shape together (`torch.vmap`), beside learning one after the other.

    python benchmarks/together.py                                 # the embedded model
    python benchmarks/together.py FOLDER --layers 8 --name smollm2
    python benchmarks/together.py FOLDER --device cuda            # where each is a launch

Phase 1 does not do this; what it would save is seconds and operations of a step, a pair, and what
it would change is α. Both ways have the same tokens, start (SmoothQuant's) and optimizer, and take
turns; α is not compared on the way, so the tokens that set the ranges stay those of the start. The
conditions are those of `peers.py`; blocks with attention inside are not among them. A run is added
to the file.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, patch_attr
from file_of_runs import add_run, bench_of
from one_peer import Bench
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aimet_quadapter import CalibrationConfig, find_pairs
from aimet_quadapter.learning.analytic import evidence, smoothquant
from aimet_quadapter.learning.block_error import BlockError
from aimet_quadapter.learning.blocks import Block, Run, capture
from aimet_quadapter.pairs.attachment import patched
from aimet_quadapter.sim import ranges
from aimet_quadapter.sim.ranges import placeholders
from aimet_quadapter.sim.samples import as_samples
from aimet_quadapter.sim.weights import frozen

FILE = Path(__file__).parent / "results" / "cost" / "together.json"
SIZES = (1, 2, 4, 8)
TURNS = 3
STEPS = (1, 40)
"""After how many α are compared; the last are timed."""

CONFIG = CalibrationConfig(choice="block")
VIEWS = (
    *("view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "detach"),
    *("alias", "unsqueeze", "squeeze", "unflatten", "_unsafe_view", "as_strided"),
)
"""Operations that compute nothing."""


class Quantized(torch.autograd.Function):
    """`ranges._BatchQuantizeDequantize` in a form that `torch.vmap` takes: nothing in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, ...]:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        steps = qmax - qmin
        if symmetric:
            down, up = math.ceil(steps / 2), math.floor(steps / 2)
            scale = torch.maximum(high / up, -low / down).clamp(min=ranges.TINY)
            offset = torch.full_like(scale, -round((qmin + qmax) / 2))
            by_high = (high / up >= -low / down).to(x)
            share_low, share_high = (by_high - 1) / down, by_high / up
        else:
            scale = ((high - low) / steps).clamp(min=ranges.TINY)
            offset = (low / scale).round() - qmin
            share_low, share_high = -(low < 0).to(x) / steps, (high > 0).to(x) / steps
        y = (x / scale).round().clamp(qmin + offset, qmax + offset) * scale
        return y, scale, share_low, share_high

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, y, scale, share_low, share_high = ctx.saved_tensors
        of_scale = ((y - x) * grads[0]).sum(1, keepdim=True) / scale
        result = grads[0].scatter_add(
            1, ranges._first(x, torch.argmin, torch.amin), of_scale * share_low
        )
        result = result.scatter_add(
            1, ranges._first(x, torch.argmax, torch.amax), of_scale * share_high
        )
        return result, None, None, None


@contextmanager
def vmapped() -> Iterator[None]:
    """Quantize by `Quantized`."""
    apply = staticmethod(lambda *given: Quantized.apply(*given)[0])
    with patch_attr(ranges, "_BatchQuantizeDequantize", type("Vmapped", (), {"apply": apply})):
        yield


class Group:
    """Blocks of one shape, and both ways to learn their α."""

    def __init__(self, bench: Bench, blocks: Sequence[Block], found: Mapping[str, Any]) -> None:
        model, device = blocks[0].model, bench.args.device
        starts = [smoothquant(model, block.pair, found[block.name]) for block in blocks]
        self.start = torch.stack(starts).to(device).float()
        self.errors = [BlockError(block, CONFIG) for block in blocks]
        seen = [e.on_held_back(alpha)[1] for e, alpha in zip(self.errors, self.start, strict=True)]
        most = max(map(len, seen))
        self.extremes = [torch.cat([x, x[-1:].expand(most - len(x))]) for x in seen]
        self.block = blocks[0]
        of_each = [[n.module for n in b.runs[0].nodes if n.module is not None] for b in blocks]
        self.modules = of_each[0]
        self.parameters = [
            {
                name: torch.stack([getattr(module, name).detach() for module in alike])
                for name, _ in alike[0].named_parameters(recurse=False)
            }
            for alike in zip(*of_each, strict=True)
        ]
        self.inputs = _stacked(list(b.runs[0].inputs.values()) for b in blocks)
        self.targets = _stacked(e.targets[0] for e in self.errors)
        self.power = _stacked(e._power[0] for e in self.errors)
        self.trained = self.errors[0]._trained[0].nonzero()[:, 0]

    def one_by_one(self, steps: int) -> Tensor:
        """α (blocks, channels), block by block, as in phase 1."""
        found = []
        for error, start, extremes in zip(self.errors, self.start, self.extremes, strict=True):
            error._generator = torch.Generator().manual_seed(CONFIG.seed)
            found.append(learned(lambda a: error.on_trained(1, a[0], extremes), start[None], steps))  # noqa: B023
        return torch.cat(found)

    def together(self, steps: int) -> Tensor:
        """The same as one computation."""
        generator = torch.Generator().manual_seed(CONFIG.seed)
        extremes = torch.stack(self.extremes).to(self.start.device)

        def errors(alpha: Tensor) -> Tensor:
            order = torch.randperm(self.trained.numel(), generator=generator)
            chosen = self.trained[order[: CONFIG.tokens]].to(alpha.device)
            of_one = partial(self._error, chosen)
            given = alpha, extremes, self.parameters, self.inputs, self.targets, self.power
            return torch.vmap(of_one)(*given)

        with vmapped(), self.block.quantized():
            return learned(errors, self.start, steps)

    def _error(
        self,
        chosen: Tensor,
        alpha: Tensor,
        extremes: Tensor,
        parameters: Sequence[dict[str, Tensor]],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        power: Sequence[Tensor],
    ) -> Tensor:
        """`BlockError.on_trained` of one block."""
        tokens = torch.cat([chosen, extremes])
        keys = self.block.runs[0].inputs
        run = Run(self.block.runs[0].nodes, dict(zip(keys, inputs, strict=True)))
        with ExitStack() as stack:
            for module, own in zip(self.modules, parameters, strict=True):
                stack.enter_context(patched(module, own))
            outputs = self.block(run, alpha, tokens)
        total = torch.zeros((), device=alpha.device)
        for y, target, size in zip(outputs, targets, power, strict=True):
            error = y[: len(chosen)].float() - target[chosen]
            total = total + error.pow(2).sum(-1).mean() / size
        return total


def _stacked(of_blocks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of all blocks that stand at the same place."""
    return [torch.stack(alike) for alike in zip(*of_blocks, strict=True)]


def learned(errors: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Adam on log α, a row a block.

    Args:
        errors: α (blocks, channels) → an error each, or their sum.
        start: where it begins.
        steps: how many.
    """
    parameter = start.log().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=CONFIG.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, CONFIG.steps // 4, CONFIG.decay)
    unit: Tensor | None = None
    for _ in range(steps):
        error = errors(parameter.exp())
        unit = error.detach() if unit is None else unit
        (parameter.grad,) = torch.autograd.grad((error / unit).sum(), [parameter])
        optimizer.step()
        schedule.step()
    return parameter.detach().exp()


def by_shape(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    """Blocks that treat every token alone, of which there are two or more: kind, shapes → those."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        weights = [tuple(p.shape) for m in block.modules for p in m.parameters(False)]
        if block.by_row:
            found.setdefault(f"{block.pair.kind} {weights}", []).append(block)
    return {shape: alike for shape, alike in found.items() if len(alike) > 1}


class Operations(TorchDispatchMode):
    """Counts those that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += call.overloadpacket.__name__ not in VIEWS
        return call(*args, **kwargs or {})


def operations_of(learn: Callable[[int], Tensor]) -> int:
    """In a step."""
    counts = []
    for steps in (1, 2):
        with Operations() as operations:
            learn(steps)
        counts.append(operations.count)
    return counts[1] - counts[0]


def seconds_of(learn: Callable[[int], Tensor], device: str) -> float:
    """Of a step; of this process on a CPU, by the clock on a GPU."""
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    begin = clock()
    learn(STEPS[-1])
    if cuda:
        torch.cuda.synchronize()
    return (clock() - begin) / STEPS[-1]


def compared(group: Group, device: str) -> dict[str, Any]:
    """One by one and together: seconds and operations of a step, a pair, and the α."""
    size = len(group.errors)
    both = {"one by one": group.one_by_one, "together": group.together}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(TURNS):
        for name, learn in both.items():
            seconds[name].append(seconds_of(learn, device) / size)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    apart = {}
    for steps in STEPS:
        alone, joint = (learn(steps) for learn in both.values())
        apart[steps] = float(((alone - joint).abs() / alone).max())
    return {
        "size": size,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "operations": {name: operations_of(learn) / size for name, learn in both.items()},
        "alpha apart after steps": apart,
    }


def main() -> None:
    """Compare groups of each kind of pair."""
    bench = bench_of(__doc__, FILE)
    sim = bench.sim()
    samples = as_samples(bench.samples, sim.model)
    pairs = find_pairs(sim, samples=samples)
    groups = []
    with placeholders(sim.quantizers()), in_eval_mode(sim.model), frozen(sim.model):
        found = evidence(sim.model, pairs, samples)
        (blocks,) = capture(sim, pairs, samples, 1 << 36)
        for shape, alike in by_shape(blocks).items():
            for size in [size for size in SIZES if size <= len(alike)]:
                group = compared(Group(bench, alike[:size], found), bench.args.device)
                groups.append({"blocks": shape, **group})
                print(json.dumps(groups[-1]))
    add_run(bench.args, CONFIG, "together.py", {"turns": TURNS, "groups": groups})


if __name__ == "__main__":
    main()
