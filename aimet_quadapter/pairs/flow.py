"""Where the channels of one producer go in one recording.

Every output channel of a producer gets a label, its own number. The labels are carried through
the recorded graph by the operations themselves: data movement is simply run on the labels, an
operation that commutes with a positive scale per channel keeps them, any other blocks the
channels it reads. What arrives at a consumer says which scale divides each of its input columns.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.prepended import Prepended
from ..sim.trace import Node, Trace
from .commute import Blocked, carry, distinct
from .pair import CONVS, TRANSPOSED, channel_dim
from .sharing import Sharing

WEIGHTED = (nn.Linear, *CONVS, *TRANSPOSED)


@dataclass
class Flow:
    """Where the channels of one producer go on one way through the model.

    Attributes:
        trace: the recording.
        start: the producer's call.
        channels: number of its output channels.
        consumers: each call that reads it, with the label of each input channel.
        constants: name of each module that puts constants before it → the labels of these.
        blocked: channel → why it cannot be scaled.
        path: index → operation that it passes.
    """

    trace: Trace
    start: Node
    channels: int
    consumers: list[tuple[Node, Tensor]]
    blocked: dict[int, str]
    path: dict[int, Node]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def block(self, channels: Tensor, why: str) -> None:
        """Note of some channels why they cannot be scaled; the first reason stays."""
        for channel in distinct(channels):
            self.blocked.setdefault(channel, why)


def follow(trace: Trace, start: Node, sharing: Sharing) -> Flow | str:
    """Carry the labels of one producer to the end of a recording; or why it can be none."""
    reason = _cannot_produce(trace, start, sharing)
    if reason:
        return reason
    first = _start_labels(start)
    labels: dict[int, Tensor] = {start.outputs[0].index: first}
    flow = Flow(trace, start, int(first.max()) + 1, [], {}, {start.index: start})
    always_empty: set[int] = set()
    for node in _downstream(trace, labels):
        read = [v.index for v in node.inputs if v.index in labels]
        if any(not labels[i].numel() and i not in always_empty for i in read):
            flow.block(first, f"{node.name} reads a part of it that is empty in this sample")
            continue
        try:
            if isinstance(node.module, WEIGHTED):
                flow.consumers.append((node, _columns(trace, node, labels, sharing)))
            else:
                labels.update(carry(node, labels, flow.blocked))
                if len(read) == 1 and _holds_no_channel(labels, read[0], node):
                    always_empty.add(node.outputs[0].index)
                if isinstance(node.module, Prepended):
                    flow.constants[node.name] = labels[node.outputs[0].index][:1, :, :1]
            flow.path[node.index] = node
        except Blocked as e:
            for value in node.inputs:
                if value.index in labels:
                    flow.block(labels[value.index], str(e))
    for index in trace.outputs & labels.keys():
        flow.block(labels[index], "the model's output would be scaled")
    return flow


def _holds_no_channel(labels: dict[int, Tensor], read: int, node: Node) -> bool:
    """Whether a slice is empty because it takes no channel, as it does of every sample."""
    before, after = labels[read], labels.get(node.outputs[0].index)
    if node.name != "__getitem__" or after is None or before.dim() != after.dim():
        return False
    cut = [d for d in range(before.dim()) if before.shape[d] != after.shape[d]]
    return (
        len(cut) == 1
        and not after.shape[cut[0]]
        and bool((before != before.narrow(cut[0], 0, 1)).any())
    )


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


def _cannot_produce(trace: Trace, node: Node, sharing: Sharing) -> str | None:
    module = node.module
    assert module is not None
    if getattr(module, "weight", None) is None:
        return "it has no weight to scale"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"it normalizes over {len(module.normalized_shape)} dimensions at once"
    if "weight" not in module._parameters:
        return "its weight is computed from something else (a parametrization)"
    return _shared(trace, node, sharing)


def _shared(trace: Trace, node: Node, sharing: Sharing) -> str | None:
    """Why this module's parameters cannot be changed without changing something else."""
    assert node.module is not None
    if trace.calls[id(node.module)] > 1:
        return "the module is called more than once"
    others = sharing.others(node.name, node.module)
    return f"its parameter is {others}" if others else None


def _start_labels(node: Node) -> Tensor:
    shape = node.shapes[0]
    dim = channel_dim(node.module, len(shape))
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim]).reshape(view).expand(shape).clone()


def _columns(trace: Trace, node: Node, labels: dict[int, Tensor], sharing: Sharing) -> Tensor:
    """The label of each input channel of a consumer."""
    reason = _shared(trace, node, sharing)
    if reason:
        raise Blocked(f"{node.name} reads it, but {reason}")
    module = node.module
    if len(node.inputs) != 1:
        raise Blocked(f"{node.name} reads it other than as its only input")
    value = node.inputs[0]
    found = labels[value.index].movedim(channel_dim(module, labels[value.index].dim()), 0)
    flat = found.reshape(len(found), -1)  # a linear may read a vector
    if (flat != flat[:, :1]).any():
        raise Blocked(f"an input channel of {node.name} mixes several of its channels")
    return flat[:, 0]
