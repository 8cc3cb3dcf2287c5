"""Which operation made a tensor, and the quantizer that the tensor carries from there."""

from __future__ import annotations

from typing import Any

from ..sim.trace import Node, Trace, Value, record
from .encoding import moves, quantizer


def source_of(trace: Trace, value: Value) -> Node | None:
    """The operation that made a value, before any data movement; None if it was not one alone."""
    made_by = {v.index: node for node in trace.nodes for v in node.outputs}
    node = made_by.get(value.index)
    while node is not None and moves(node):
        floats = [v for v in node.inputs if trace.dtypes[v.index].is_floating_point]
        node = made_by.get(floats[0].index) if len(floats) == 1 else None
    return node


def output_quantizer(model: Any) -> Any:
    """The quantizer that a prepared model's logits carry, None without one."""
    trace = record(model, model.dummy_input(length=2))
    source = source_of(trace, Value(min(trace.outputs)))
    return quantizer(source.module, "output_quantizers", 0) if source is not None else None
