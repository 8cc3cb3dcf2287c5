"""Operations that AIMET fuses with the ReLU behind them, written so that the HTP takes them."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

from ..artifacts.exported import constants


def quantize_before_relu(model: ModelProto) -> None:
    """Give what a ReLU reads the encoding of what it makes, in place.

    AIMET quantizes a supergroup such as Linear + ReLU at its end alone. A MatMul, an Add and a
    ReLU without a quantizer between them are no operation of the HTP; with one they are two. It
    changes nothing: a range that holds 0 clips what is negative to its lower end, which the ReLU
    makes 0, and rounds the rest as the quantizer behind the ReLU does.
    """
    graph = model.graph
    known = constants(graph)
    makers = {name: node for node in graph.node for name in node.output}
    for relu in [n for n in graph.node if n.op_type == "Relu"]:
        behind = [n for n in graph.node if relu.output[0] in n.input]
        before = makers.get(relu.input[0])
        quantized = [n.op_type for n in behind] == ["QuantizeLinear"]
        bare = before is not None and before.op_type != "DequantizeLinear"
        if quantized and bare and relu.input[0] not in known:
            _insert(model, relu, behind[0])


def _insert(model: ModelProto, relu: NodeProto, quantizer: NodeProto) -> None:
    name, source = relu.input[0], relu.name or relu.output[0]
    settings = list(quantizer.input[1:])
    attributes = {a.name: helper.get_attribute_value(a) for a in quantizer.attribute}
    nodes = [
        helper.make_node(kind, [start, *settings], [end], name=f"{source}_before_{kind}", **options)
        for kind, start, end, options in (
            ("QuantizeLinear", name, f"{name}_before_relu_q", attributes),
            ("DequantizeLinear", f"{name}_before_relu_q", f"{name}_before_relu", {}),
        )
    ]
    place = list(model.graph.node).index(relu)
    relu.input[0] = f"{name}_before_relu"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)
