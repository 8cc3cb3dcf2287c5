"""Encodings of weights that the HTP backend was seen to refuse or to compute wrongly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, numpy_helper

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose"}

WIDE = {TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32}


def doubtful_weights(file: Path) -> list[str]:
    """What to change about the weights of a QDQ file that is refused or computed wrongly.

    docs/bits.md has what was tried. A file with one of these formats may be right all the same: a
    compilation is judged by what it computes, and this says what may be the reason.

    Args:
        file: a QDQ file, already trusted.

    Returns:
        One sentence a format: how many weights have it, and what the backend takes.
    """
    weights = _Weights(file)
    counts = Counter(filter(None, map(weights.doubt, weights.reads)))
    return [f"{count} {sentence}" for sentence, count in counts.items()]


class _Weights:
    """The constants of a QDQ file that have an encoding."""

    def __init__(self, file: Path) -> None:
        graph = onnx.load(file, load_external_data=False).graph
        self.folder = file.parent
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.products = {name for n in graph.node if n.op_type == "MatMul" for name in n.output}
        self.narrow = any(
            n.op_type == "QuantizeLinear" and self._type(n.input[2:]) == TensorProto.UINT8
            for n in graph.node
        )
        encoded = {
            n.output[0]: n
            for n in graph.node
            if n.op_type == "DequantizeLinear" and n.input[0] in self.tensors
        }
        self.reads = [
            (encoded[name], reader, place)
            for reader in graph.node
            for place, name in enumerate(reader.input)
            if name in encoded
        ]
        """Of each: its DequantizeLinear, who reads that, and at which place."""

    def doubt(self, read: tuple[NodeProto, NodeProto, int]) -> str | None:
        """What the backend takes instead of this weight; None for one that it is known to take."""
        node, reader, place = read
        if self._is_bias(reader, place):
            return "biases have an encoding: the backend makes its own. Remove their quantizers."
        scale = self.tensors.get(node.input[1])
        several = scale is None or any(n > 1 for n in scale.dims)
        if reader.op_type == "Gather" and several:
            return "embeddings have several ranges: the backend takes one for the whole tensor."
        if reader.op_type not in PRODUCTS:
            return None
        if any(attribute.name == "block_size" for attribute in node.attribute):
            return (
                "weights have a range a block: the backend takes it on products without a bias, "
                "plain blocks beside activations of 16 bits only, and refuses others or computes "
                "them wrongly. Give them one a channel."
            )
        if several and self._shifted(node):
            return (
                "weights have a range a channel that is not symmetric: the backend takes symmetric "
                "ones. Set symmetric=True on their quantizers."
            )
        if self.narrow and self._type(node.input) in WIDE:
            return (
                "weights have 16 bits or more in a model with activations of 8: the backend takes "
                "them beside activations of 16. Give them 8 or 4."
            )
        return None

    def _is_bias(self, reader: NodeProto, place: int) -> bool:
        if reader.op_type == "Add":
            return reader.input[1 - place] in self.products
        return place == 2 and reader.op_type in PRODUCTS | {"LayerNormalization"}

    def _shifted(self, node: NodeProto) -> bool:
        zero_point = self.tensors.get(node.input[2]) if len(node.input) > 2 else None
        return zero_point is not None and bool(
            numpy_helper.to_array(zero_point, str(self.folder)).any()
        )

    def _type(self, names: list[str]) -> int:
        """Integer type of the first constant named; 0 when it is none."""
        tensor = self.tensors.get(names[0]) if names else None
        return tensor.data_type if tensor is not None else 0
