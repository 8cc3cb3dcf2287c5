"""A sim's graph → the pairs in it, each proven exact; what was refused, with the reason.

Every output channel of a producer gets a label, its own number. The labels are carried through
the recorded graph by the operations themselves: data movement is simply run on the labels, an
operation that commutes with a positive scale per channel keeps them, any other blocks the
channels it reads. What arrives at a consumer says which scale divides each of its input columns.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor, nn

from ..sim.inputs import example_inputs
from ..sim.trace import Node, Trace, record
from .commute import Blocked, carry
from .pair import CONVS, TRANSPOSED, Pair, Pairs, Refusal, consumer_scale, producer_scales
from .proof import inexact

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WEIGHTED = (nn.Linear, *CONVS, *TRANSPOSED)

Owners = dict[int, list[str]]
"""id of a parameter → names of the modules that hold it."""


def find_pairs(
    sim: Any,
    dummy_input: Any = None,
    kinds: Iterable[str] | None = None,
    names: str | None = None,
) -> Pairs:
    """Find every pair in the graph of a sim and prove each.

    Args:
        sim: an AIMET `QuantizationSimModel` of any torch model.
        dummy_input: what the sim was made with; needed only for a model that `prepare` did not
            make and whose inputs are not all float tensors. A tuple is positional arguments, a
            dict keyword arguments.
        kinds: as in `Pairs.select`.
        names: as in `Pairs.select`.

    Returns:
        The pairs, in order of execution, with the refused candidates: those that the graph rules
        out, and those that it promises but that change the model's output.

    Raises:
        SimError: not a sim, or an input is needed and was not given.
        PairError: the model returns nothing finite that could be compared.
    """
    inputs = example_inputs(sim, dummy_input)
    trace = record(sim.model, inputs)
    owners = _owners(sim.model)
    found: list[Pair] = []
    refused: list[Refusal] = []
    with torch.no_grad(), remove_all_quantizers(sim.model):  # modules are run on labels
        for node in trace.nodes:
            if isinstance(node.module, (*NORMS, *WEIGHTED)):
                result = _follow(trace, node, owners)
                if isinstance(result, Pair):
                    found.append(result)
                elif result not in refused:
                    refused.append(result)
    pairs = Pairs(tuple(found), tuple(refused)).select(kinds, names)
    failed = inexact(sim, pairs, inputs)
    return pairs.without(failed) if failed else pairs


def _follow(trace: Trace, start: Node, owners: Owners) -> Pair | Refusal:
    """Carry the labels of one producer to the end of the graph."""
    module = start.module
    assert module is not None
    reason = _cannot_produce(trace, start, owners)
    if reason:
        return Refusal(start.name, reason)
    labels: dict[int, Tensor] = {start.outputs[0].index: _start_labels(start)}
    blocked: dict[int, str] = {}
    consumers: list[tuple[Node, Tensor]] = []
    path: dict[int, Node] = {start.index: start}
    for node in _downstream(trace, labels):
        read = [v for v in node.inputs if v.index in labels]
        try:
            if isinstance(node.module, WEIGHTED):
                consumers.append((node, _columns(trace, node, labels, owners)))
            else:
                labels.update(carry(node, labels, blocked))
            path[node.index] = node
        except Blocked as e:
            for value in read:
                for channel in labels[value.index].unique().tolist():
                    blocked.setdefault(int(channel), str(e))
    for index in trace.outputs & labels.keys():
        for channel in labels[index].unique().tolist():
            blocked.setdefault(int(channel), "the model's output would be scaled")
    return _assemble(start, consumers, blocked, path, labels, trace)


def _downstream(trace: Trace, labels: dict[int, Tensor]) -> Iterator[Node]:
    """Every node that reads a labelled value, in order, while `labels` grows."""
    seen: set[int] = set()
    queued: set[int] = set()
    waiting: list[int] = []
    while True:
        for value in labels.keys() - seen:
            seen.add(value)
            for node in trace.readers.get(value, []):
                if node.index not in queued:
                    queued.add(node.index)
                    heapq.heappush(waiting, node.index)
        if not waiting:
            return
        yield trace.nodes[heapq.heappop(waiting)]


def _cannot_produce(trace: Trace, node: Node, owners: Owners) -> str | None:
    module = node.module
    assert module is not None
    if getattr(module, "weight", None) is None:
        return "it has no weight to scale"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"it normalizes over {len(module.normalized_shape)} dimensions at once"
    if "weight" not in module._parameters:
        return "its weight is computed from something else (a parametrization)"
    return _shared(trace, node, owners)


def _owners(model: nn.Module) -> Owners:
    owners: Owners = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _shared(trace: Trace, node: Node, owners: Owners) -> str | None:
    """Why this module's parameters cannot be changed without changing something else."""
    assert node.module is not None
    if trace.calls[id(node.module)] > 1:
        return "the module is called more than once"
    for parameter in node.module.parameters(recurse=False):
        others = [n for n in owners[id(parameter)] if n != node.name]
        if others:
            return f"its parameter is tied to {', '.join(others)}"
        if id(parameter) in trace.constants:
            return f"its parameter is also read by {trace.constants[id(parameter)]}()"
    return None


def _channel_dim(module: nn.Module | None, ndim: int) -> int:
    """Dimension of a module's input or output that holds the channels."""
    if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
        return ndim - 1
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return ndim - 1 - len(module.kernel_size)
    return 1


def _start_labels(node: Node) -> Tensor:
    shape = node.shapes[0]
    dim = _channel_dim(node.module, len(shape))
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim]).reshape(view).expand(shape).clone()


def _columns(trace: Trace, node: Node, labels: dict[int, Tensor], owners: Owners) -> Tensor:
    """The label of each input channel of a consumer."""
    reason = _shared(trace, node, owners)
    if reason:
        raise Blocked(f"{node.name} reads it, but {reason}")
    module = node.module
    if len(node.inputs) != 1:
        raise Blocked(f"{node.name} reads it other than as its only input")
    value = node.inputs[0]
    found = labels[value.index].movedim(_channel_dim(module, labels[value.index].dim()), 0)
    flat = found.flatten(1)
    if (flat != flat[:, :1]).any():
        raise Blocked(f"an input channel of {node.name} mixes several of its channels")
    return flat[:, 0]


def _assemble(
    start: Node,
    consumers: list[tuple[Node, Tensor]],
    blocked: dict[int, str],
    path: dict[int, Node],
    labels: dict[int, Tensor],
    trace: Trace,
) -> Pair | Refusal:
    reached = {int(c) for _, columns in consumers for c in columns.unique()} - {-1}
    blocked.pop(-1, None)
    good = sorted(reached - blocked.keys())
    if not good:
        return Refusal(start.name, _why(blocked))
    total = int(labels[start.outputs[0].index].max()) + 1
    new = torch.full((total + 1,), -1)  # old label → place in α; the last entry serves −1
    new[torch.tensor(good)] = torch.arange(len(good))
    users = [(n, new[c]) for n, c in consumers if (new[c] >= 0).any()]
    block = _between(start, [n for n, _ in users], path)
    assert start.module is not None
    scales = list(producer_scales(start.name, start.module, new[:total]))
    for node, columns in users:
        assert node.module is not None
        scales.append(consumer_scale(node.name, node.module, columns))
    inner = [n for n in block if n is not start and n not in [u for u, _ in users]]
    return Pair(
        kind=_kind(start, users, inner, trace),
        producer=start.name,
        consumers=tuple(n.name for n, _ in users),
        channels=len(good),
        scales=tuple(scales),
        columns=tuple(c for _, c in users),
        between=tuple(n.name for n in inner if n.module is not None),
        nodes=tuple((n.index - start.index, n.name) for n in block),
    )


def _why(blocked: dict[int, str]) -> str:
    if not blocked:
        return "no linear or convolution reads it"
    reasons = list(blocked.values())
    return max(dict.fromkeys(reasons), key=reasons.count)


def _between(start: Node, ends: list[Node], path: dict[int, Node]) -> list[Node]:
    """Nodes on a way from the producer to a consumer, in order."""
    needed = {n.index for n in ends}
    wanted = {v.index for n in ends for v in n.inputs}
    for index in sorted(path, reverse=True):
        node = path[index]
        inside = node is start or not isinstance(node.module, WEIGHTED)
        if index not in needed and inside and any(v.index in wanted for v in node.outputs):
            needed.add(index)
            wanted |= {v.index for v in node.inputs}
    return [path[i] for i in sorted(needed)]


def _kind(start: Node, users: list[tuple[Node, Tensor]], inner: list[Node], trace: Trace) -> str:
    module = start.module
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        ends = {v.index for n, _ in users for v in n.outputs}
        return "norm-head" if ends & trace.outputs else "norm-linear"
    if isinstance(module, NORMS):
        return "norm-conv"
    names = {type(n.module).__name__.lower() if n.module else n.name.lower() for n in inner}
    if any(word in n for n in names for word in ("matmul", "bmm", "attention")):
        return "v-o"
    if any("mul" in n for n in names):
        return "up-down"
    family = "linear" if isinstance(module, nn.Linear) else "conv"
    return f"{family}-relu-{family}" if any("relu" in n for n in names) else f"{family}-{family}"
