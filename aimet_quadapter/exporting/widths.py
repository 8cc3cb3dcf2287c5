"""Operations between 8 and 16 bits, written so that the HTP takes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..artifacts.exported import QDQ_TYPES, constants

NARROW, WIDE = TensorProto.UINT8, TensorProto.UINT16
"""The integer types of activations that AIMET's exporter writes."""

STEPS = 257
"""Steps of 16 bits in one of 8: (2¹⁶ − 1) / (2⁸ − 1), so every value of 8 bits is one of 16."""

ELEMENTWISE = {"Add", "Div", "Mul", "Sub"}
"""Operations whose constants are activations; elsewhere a constant is a weight."""


def match_widths(model: ModelProto) -> int:
    """Let every operation of a QDQ file read and write activations of one width.

    The HTP computes an operation in one width: a linear that reads 8 bits and writes 16 does not
    lower. Where a sim has such operations, all their activations get the wider type, by a
    QuantizeLinear and a DequantizeLinear behind an 8-bit input (scale / 257, zero point × 257:
    the values stay what they are) and before an 8-bit output (which is rounded twice, to 1/257 of
    its step first). A file of one width is not changed.

    Args:
        model: a QDQ model; changed in place.

    Returns:
        Number of conversions.
    """
    return _Widths(model.graph).match()


class _Widths:
    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.known = constants(graph)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.behind: dict[str, list[NodeProto]] = {}  # tensor → nodes to put behind its own
        self.wide: dict[tuple[str, ...], str] = {}  # tensor, scale, zero point → the wide tensor

    def match(self) -> int:
        for unit in self._units():
            inputs, outputs = list(self._inputs(unit)), list(self._outputs(unit))
            types = {self._type(q) for _, _, q in inputs} | {self._type(q) for q in outputs}
            if not types >= {NARROW, WIDE}:
                continue
            for node, place, q in inputs:
                if self._type(q) == NARROW:
                    node.input[place] = self._widened(node.input[place], q)
            for q in outputs:
                if self._type(q) == NARROW:
                    q.input[0] = self._widened(q.input[0], q)
        nodes = []
        for node in self.graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self.behind.get(name, ())
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return len(self.wide)

    def _units(self) -> list[list[NodeProto]]:
        """Operations with no quantizer between them, such as a product and the sum with a bias."""
        of: dict[str, list[NodeProto]] = {}
        units: list[list[NodeProto]] = []
        for node in self.graph.node:
            if node.op_type in QDQ_TYPES or self.known.issuperset(node.output):
                continue
            joined = list({id(of[name]): of[name] for name in node.input if name in of}.values())
            unit = joined[0] if joined else []
            for other in joined[1:]:
                unit += other
                units = [u for u in units if u is not other]
            unit.append(node)
            if not joined:
                units.append(unit)
            of |= {name: unit for member in unit for name in member.output}
        return units

    def _inputs(self, unit: list[NodeProto]) -> Iterator[tuple[NodeProto, int, NodeProto]]:
        """Each activation that a unit reads: the reader, its place there, the quantizer."""
        for node in unit:
            for place, name in enumerate(node.input):
                q = self.producer.get(name)
                if q is None or q.op_type != "DequantizeLinear":
                    continue
                if name not in self.known or node.op_type in ELEMENTWISE:
                    yield node, place, q

    def _outputs(self, unit: list[NodeProto]) -> Iterator[NodeProto]:
        for node in unit:
            for name in node.output:
                yield from (q for q in self.readers.get(name, ()) if q.op_type == "QuantizeLinear")

    def _type(self, q: NodeProto) -> int:
        """Integer type of a quantizer; 0 for one with several ranges or without a zero point."""
        zero_point = self.initializers.get(q.input[2]) if len(q.input) > 2 else None
        return zero_point.data_type if zero_point is not None and not zero_point.dims else 0

    def _widened(self, name: str, q: NodeProto) -> str:
        """The tensor in the wide type, with the range of a narrow quantizer."""
        key = (name, *q.input[1:])
        if key in self.wide:
            return self.wide[key]
        scale = numpy_helper.to_array(self.initializers[q.input[1]])
        zero_point = int(numpy_helper.to_array(self.initializers[q.input[2]]))
        others = len(self.behind.get(name, ())) // 2
        result = f"{name}_wide{others or ''}"
        integers, *ends = (f"{result}_{part}" for part in ("q", "scale", "zero_point"))
        self.graph.initializer.extend(
            [
                numpy_helper.from_array((scale / STEPS).astype(scale.dtype), ends[0]),
                numpy_helper.from_array(np.array(zero_point * STEPS, np.uint16), ends[1]),
            ]
        )
        self.behind.setdefault(name, []).extend(
            [
                helper.make_node("QuantizeLinear", [name, *ends], [integers], integers),
                helper.make_node("DequantizeLinear", [integers, *ends], [result], result),
            ]
        )
        self.wide[key] = result
        return result
