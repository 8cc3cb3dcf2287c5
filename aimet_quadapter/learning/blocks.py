"""A pair's block cut out of the model: its inputs recorded once, run again with any α."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from aimet_torch.nn.modules import custom
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor, nn

from ..errors import DataError
from ..models.norms import norm_of
from ..pairs.attachment import patched, scaled
from ..pairs.pair import Pair, channel_dim
from ..sim.inputs import Sample
from ..sim.ranges import activation_quantizers, dynamic, off, weight_quantizers
from ..sim.replay import Replay
from ..sim.trace import Node, Trace, Value, recordings

T = TypeVar("T")

ROW_MODULES = (
    nn.Linear,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    custom.Multiply,
)
"""Besides norms, operations that treat every token alone: a block of these runs on any tokens."""


@dataclass
class Run:
    """A block on one sample: the operations with the sample's own shapes, and their inputs."""

    nodes: list[Node]
    inputs: dict[int, Tensor]


@dataclass
class Block:
    """What is needed to run a pair's block again.

    Attributes:
        pair: the pair.
        model: the sim's model.
        runs: one for each sample, or a single one in which all samples' tokens lie in a row.
        by_row: whether tokens can be chosen freely.
        rows: for each consumer, the output rows used (None: all).
    """

    pair: Pair
    model: nn.Module
    runs: list[Run]
    by_row: bool
    rows: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return (self.pair,)

    @property
    def inputs(self) -> list[Tensor]:
        """What was recorded, of all runs."""
        return [x for run in self.runs for x in run.inputs.values()]

    @property
    def modules(self) -> list[nn.Module]:
        """Its modules, in order."""
        return [n.module for n in self.runs[0].nodes if n.module is not None]

    @property
    def tokens(self) -> int:
        """Number of tokens of a block that works by row."""
        return next(iter(self.runs[0].inputs.values())).shape[0]

    def __call__(
        self,
        run: Run,
        alpha: Tensor | None = None,
        tokens: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> list[Tensor]:
        """Outputs of the consumers, each (…, channels), with the quantizers in their present state.

        Args:
            run: one of `runs`.
            alpha: α, shape (channels,); None leaves the weights as they are.
            tokens: indices of the tokens to run; only for a block that works by row.
            wanted: the rows of (…) to return, as a mask, each output then (rows, channels); the
                others pass the quantizers inside, and not the consumers where that can be.
        """
        values = dict(run.inputs)
        if tokens is not None:
            values = {i: v[tokens] for i, v in values.items()}
        outputs = []
        with self._weights(alpha):
            for node in run.nodes:
                few = wanted is not None and node.name in self._last
                read = {v.index: values[v.index][wanted] for v in node.inputs} if few else values
                out = node.run(read)
                if node.name in self.pair.consumers:
                    rows = out.movedim(channel_dim(node.module, out.dim()), -1)
                    outputs.append(rows if wanted is None or few else rows.flatten(0, -2)[wanted])
                flat = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
                values.update({v.index: t for v, t in zip(node.outputs, flat, strict=True)})
        return outputs

    @functools.cached_property
    def _last(self) -> set[str]:
        """Consumers that need not run on all rows: they quantize no input, and end the block."""
        read = {v.index for run in self.runs for node in run.nodes for v in node.inputs}
        return {
            node.name
            for node in self.runs[0].nodes
            if self.by_row
            and node.name in self.pair.consumers
            and node.module is not None
            and not activation_quantizers(node.module, "input")
            and not read.intersection(v.index for v in node.outputs)
        }

    @contextmanager
    def _weights(self, alpha: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            for name, rows in self.rows.items():
                if rows is not None:  # before α: a step then costs these rows, not the whole head
                    module = self.model.get_submodule(name)
                    used = {n: p[rows] for n, p in module.named_parameters(recurse=False)}
                    stack.enter_context(patched(module, used))
            if alpha is not None:
                stack.enter_context(scaled(self.model, [self.pair], {self.pair.name: alpha}))
            yield

    @contextmanager
    def quantized(self, observe: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        """Dynamic ranges for the block's own quantizers; those outside its ends are off.

        Inside the block are the weights' quantizers and every activation quantizer from the
        producer's output to the consumers' inputs. The producer's input and the consumers'
        outputs belong to the neighbours.

        Args:
            observe: called with each tensor that passes an activation quantizer.
        """
        weights, inside, outside = self._quantizers()
        with dynamic(weights), dynamic(inside, observe), off(outside):
            yield

    def as_it_is(self) -> Any:
        """The block's own quantizers as they are; those outside its ends are off."""
        return off(self._quantizers()[2])

    def _quantizers(self) -> tuple[list[QuantizerBase], list[QuantizerBase], list[QuantizerBase]]:
        """Of the weights, of the activations inside the block, of those outside its ends."""
        modules = {n.name: n.module for run in self.runs for n in run.nodes if n.module is not None}
        sides = [(self.pair.producer, "input"), *((n, "output") for n in self.pair.consumers)]
        weights = [q for module in modules.values() for q in weight_quantizers(module)]
        return weights, quantizers_inside(self.model, self.pair), _at(self.model, sides)

    def unquantized(self) -> Any:
        """All of the block's quantizers removed for a while."""
        modules = {n.name: n.module for run in self.runs for n in run.nodes if n.module}
        return remove_all_quantizers(list(modules.values()))


def quantizers_inside(model: nn.Module, pair: Pair) -> list[QuantizerBase]:
    """The activation quantizers from the producer's output to the consumers' inputs."""
    sides = [(pair.producer, "output"), *((name, "input") for name in pair.consumers)]
    return _at(model, [*sides, *((n, side) for n in pair.between for side in ("input", "output"))])


def _at(model: nn.Module, sides: Iterable[tuple[str, str]]) -> list[QuantizerBase]:
    return [q for n, side in sides for q in activation_quantizers(model.get_submodule(n), side)]


def capture(
    sim: Any,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    budget: int,
    plans: Sequence[Trace] | None = None,
) -> Iterator[list[Block]]:
    """Cut the blocks of some pairs out of the unquantized model, a group at a time.

    Args:
        sim: the sim.
        pairs: pairs in order of execution.
        samples: inputs of the model.
        budget: bytes of block inputs held at a time.
        plans: the samples' `ways`, where they are known.

    Raises:
        DataError: the samples take another way through the model than the pairs were found on.
    """
    plans = ways(sim, samples) if plans is None else plans
    replays = [Replay(sim.model, *both) for both in zip(plans, samples, strict=True)]
    done = 0
    for group in in_groups(pairs, block_sizes(pairs, plans), budget):
        done += len(group)
        yield _capture_group(group, pairs[done:], replays)


def block_sizes(pairs: Sequence[Pair], plans: Sequence[Trace]) -> list[int]:
    """Bytes of each block's inputs on all samples.

    Args:
        pairs: of the blocks.
        plans: the samples' `ways`.
    """
    return [sum(sum(_sizes(plan, _locate(plan, pair))) for plan in plans) for pair in pairs]


def in_groups(items: Iterable[T], sizes: Iterable[int], budget: int) -> Iterator[list[T]]:
    """The items in their order, as many at a time as the budget holds, one at least."""
    group: list[T] = []
    used = 0
    for item, size in zip(items, sizes, strict=True):
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(item)
        used += size
    if group:
        yield group


def ways(sim: Any, samples: Sequence[Sample]) -> list[Trace]:
    """For each sample a recording of its way, one for all with the same way and settings."""
    found: dict[Any, Trace] = {}
    traces = recordings(sim.model, samples)
    return [found.setdefault((trace.form, trace.settings), trace) for trace in traces]


def check_ways(pairs: Sequence[Pair], plans: Iterable[Trace]) -> None:
    """Raise DataError if some samples take another way than a pair was found on."""
    for plan in {id(plan): plan for plan in plans}.values():
        for pair in pairs:
            _locate(plan, pair)


def reached(pair: Pair, plans: Sequence[Trace]) -> bool:
    """Whether a pair's producer computes anything on one of some ways."""
    return any(n.name == pair.producer and not n.empty for plan in plans for n in plan.nodes)


def _locate(trace: Trace, pair: Pair) -> list[Node]:
    """The block's nodes in a recording; none where the producer computes nothing.

    A pair holds their distances from the producer on each way that it was found on.
    """
    starts = (n.index for n in trace.nodes if n.name == pair.producer and not n.empty)
    start = next(starts, None)
    if start is None:
        return []
    for way in pair.ways:
        places = [(start + distance, name) for distance, name in way]
        if all(i < len(trace.nodes) and trace.nodes[i].name == n for i, n in places):
            return [trace.nodes[i] for i, _ in places]
    raise DataError(
        f"the calibration samples take another way through the model than the pair {pair.name!r} "
        "was found on. Find the pairs on them: find_pairs(sim, samples=calib_loader)."
    )


def _by_row(module: nn.Module | None) -> bool:
    return module is not None and (isinstance(module, ROW_MODULES) or norm_of(module) is not None)


def _external(nodes: Sequence[Node]) -> list[Value]:
    made = {v.index for n in nodes for v in n.outputs}
    return list({v.index: v for n in nodes for v in n.inputs if v.index not in made}.values())


def _sizes(trace: Trace, nodes: Sequence[Node]) -> Iterable[int]:
    read = [v.index for v in _external(nodes) if v.index in trace.shapes]
    return [trace.shapes[i].numel() * trace.dtypes[i].itemsize for i in read]


def _capture_group(
    group: Sequence[Pair], rest: Sequence[Pair], replays: Sequence[Replay]
) -> list[Block]:
    """The blocks of a group, whose samples go on to its end; `rest` are the pairs behind it."""
    of_samples = (_recorded(replay, group, rest) for replay in replays)
    runs = [[run for run in of_pair if run] for of_pair in zip(*of_samples, strict=True)]
    return [_block(replays[0].model, pair, runs.pop(0)) for pair in group]  # none is held twice


def _recorded(replay: Replay, group: Sequence[Pair], rest: Sequence[Pair]) -> list[Run | None]:
    located = [_locate(replay.trace, pair) for pair in group]
    later = {v.index for p in rest for v in _external(_locate(replay.trace, p))}
    stop = max((n.index for nodes in located for n in nodes), default=-1)
    kept = replay.until(stop, {v.index for nodes in located for v in _external(nodes)}, later)
    return [Run(n, {v.index: kept[v.index] for v in _external(n)}) if n else None for n in located]


def _block(model: nn.Module, pair: Pair, runs: list[Run]) -> Block:
    if not runs:
        raise DataError(
            f"no calibration sample runs the pair {pair.name!r}. Add samples that do, or leave the "
            "pair out."
        )
    by_row = (
        len({tuple(n.name for n in run.nodes) for run in runs}) == 1
        and all(_by_row(n.module) for n in runs[0].nodes)
        and all(len({t.shape[:-1] for t in run.inputs.values()}) == 1 for run in runs)
    )
    if by_row:
        # Values are numbered anew on each way; the block's inputs come in the same order.
        of_runs = zip(*(run.inputs.values() for run in runs), strict=True)
        joined = [torch.cat([t.flatten(0, -2) for t in of_all]) for of_all in of_runs]
        inputs = dict(zip(runs[0].inputs, joined, strict=True))
        runs = [Run(runs[0].nodes, inputs)]
    return Block(pair, model, runs, by_row)
