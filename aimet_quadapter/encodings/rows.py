"""The encodings of each operation in a recording of a sim's model, and the reason for none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..sim.trace import Node, Trace, Value
from .carriers import Carriers, supergroups
from .encoding import (
    Encoding,
    Row,
    has_quantizers,
    moves,
    onnx_types,
    operands,
    parameter_quantizers,
    quantizer,
)

CONSTANTS = {
    f"{what}{like}"
    for what in ("zeros", "ones", "full", "empty")
    for like in ("_like", "")
} | {f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor")}  # fmt: skip
"""Functions whose result does not depend on the values they read."""

NO_ENCODING_NEEDED = {"bias"}
"""A bias takes the scale of input × weight, 32 bits."""


def describe(sim: Any, trace: Trace) -> Iterator[Row]:
    """A row for each operation of a recording, in order."""
    rows = _Rows(trace, Carriers(trace, supergroups(sim)))
    for node in trace.nodes:
        if node.outputs:
            yield rows.row(node)


class _Rows:
    """Makes the rows of a recording one after the other, with the encodings of all before."""

    def __init__(self, trace: Trace, carriers: Carriers) -> None:
        self.trace = trace
        self.carriers = carriers
        self.encodings: dict[int, Encoding | None] = dict.fromkeys(trace.inputs)
        self.constants: set[int] = set()

    def row(self, node: Node) -> Row:
        if self._is_constant(node):
            self.constants |= {v.index for v in node.outputs}
            return self._finish(node, [], [None] * len(node.outputs), "constant: folded away")
        if not any(self.trace.dtypes[v.index].is_floating_point for v in node.outputs):
            return self._finish(node, [], [None] * len(node.outputs), "integers: needs none")
        if moves(node):
            return self._move(node)
        problems: list[str] = []
        notes: list[str] = []
        inputs = self._inputs(node, problems)
        self._parameters(node, problems, notes)
        outputs = [self._output(node, i, problems, notes) for i in range(len(node.outputs))]
        return self._finish(node, inputs, outputs, "; ".join(problems or notes), bool(problems))

    def _finish(
        self,
        node: Node,
        inputs: Sequence[Encoding | None],
        outputs: Sequence[Encoding | None],
        note: str,
        missing: bool = False,
    ) -> Row:
        self.encodings.update(zip((v.index for v in node.outputs), outputs, strict=True))
        module = node.module
        operation = type(module).__name__.removeprefix("Quantized") if module else "function"
        quantizers = parameter_quantizers(module)
        return Row(
            node.name,
            operation,
            tuple(inputs),
            {n: Encoding.of(q) if q else None for n, q in quantizers.items()},
            tuple(outputs),
            note,
            missing,
        )

    def _is_constant(self, node: Node) -> bool:
        if node.module is not None and has_quantizers(node.module):
            return False
        if node.module is None and node.name in CONSTANTS:
            return True
        return all(v.index in self.constants for v in node.inputs)

    def _inputs(self, node: Node, problems: list[str]) -> list[Encoding | None]:
        found: list[Encoding | None] = []
        for place, leaf in enumerate(operands(node)):
            dtype = self.trace.dtypes[leaf.index] if isinstance(leaf, Value) else leaf.dtype
            if not dtype.is_floating_point:
                continue
            own = quantizer(node.module, "input_quantizers", place)
            constant = not isinstance(leaf, Value) or leaf.index in self.constants
            if own is not None:
                found.append(Encoding.of(own))
            elif constant:
                found.append(None)
                if node.module is not None:  # a function lacks one altogether, said once
                    problems.append(f"its constant input {place} has no encoding")
            else:
                found.append(self.encodings[leaf.index])
                if leaf.index in self.trace.inputs:
                    problems.append(f"its input {place} is the model's and has no encoding")
        return found

    def _parameters(self, node: Node, problems: list[str], notes: list[str]) -> None:
        quantizers = parameter_quantizers(node.module)
        bare = [n for n, q in quantizers.items() if q is None and n not in NO_ENCODING_NEEDED]
        if not bare:
            return
        if onnx_types(node) & {"BatchNormalization"} and self.carriers.folds_into_its_input(node):
            notes.append("folds into the operation before it")
        else:
            problems.append(f"the quantizer of {', '.join(bare)} is off")

    def _output(
        self, node: Node, place: int, problems: list[str], notes: list[str]
    ) -> Encoding | None:
        own = quantizer(node.module, "output_quantizers", place)
        if own is not None:
            return Encoding.of(own)
        if isinstance(node.module, nn.Embedding):
            weight = parameter_quantizers(node.module).get("weight")
            if weight is not None:
                notes.append("gathers from its weight: keeps the weight's encoding")
                return Encoding.of(weight)
        following = self.carriers.fused(node, place)
        if following is not None:
            notes.append(f"one operation with {following.name}, which carries the encoding")
            return None
        carriers = self.carriers.carried_by(node.outputs[place])
        if carriers is not None:
            names = ", ".join(carriers) or "nothing reads it"
            notes.append(f"carried by the input quantizer of {names}" if carriers else names)
            return None
        problems.append(
            "a function outside a module: AIMET has no place for its quantizer"
            if node.module is None
            else "its output quantizer is off"
        )
        return None

    def _move(self, node: Node) -> Row:
        """Data movement: the encoding of what it reads, if that is one encoding."""
        own = quantizer(node.module, "output_quantizers", 0)
        leaves = [x for x in operands(node) if isinstance(x, Value)]
        read = [v for v in leaves if self.trace.dtypes[v.index].is_floating_point]
        inputs = [self.encodings.get(v.index) for v in read]
        if own is not None:
            return self._finish(node, inputs, [Encoding.of(own)] * len(node.outputs), "")
        known = set(inputs) - {None}
        if len(known) == 1 and None not in inputs:
            encodings = [inputs[0]] * len(node.outputs)
            return self._finish(node, inputs, encodings, "moves data: keeps its input's encoding")
        nothing = [None] * len(node.outputs)
        carried = [self.carriers.carried_by(v) for v in node.outputs]
        if len(inputs) <= 1 or all(c is not None for c in carried):
            names = ", ".join(dict.fromkeys(n for c in carried for n in c or []))
            note = f"moves data: carried by the input quantizer of {names}"
            return self._finish(
                node, inputs, nothing, note if names else "moves data: see what it reads"
            )
        return self._finish(node, inputs, nothing, "joins tensors of different encodings", True)
