"""Which operations of an ONNX file do not lower to the HTP, and why."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto
from onnx.utils import Extractor

from ..artifacts.manifest import named_files
from .htp import NO_FALLBACK, PROVIDER, QUANTIZERS, Outcome, Target, compile_apart
from .weight_formats import doubtful_weights

ADVICE = {
    "Erf": "GELU falls apart into it below opset 20: export with opset=23",
    "ReduceMean": "RMSNorm falls apart into it below opset 23: export with opset=23",
}
"""Type of an operation → what to change, where that is known."""

OTHERWISE = (
    "give it an encoding if check_export lists it; else compute it outside the model (a constant "
    "or an input), or write it with other operations"
)

SHOWN = 20
"""Operations that a message names."""

_REASON = re.compile(
    r"Validation FAILED for \d+ nodes in OrtNodeUnit \((?P<type>\w+)\)[^\n]*\n"
    r"(?P<nodes>(?:\s*Operator type: [^\n]*\n)+)\s*REASON : (?P<reason>[^\n]*)"
)
_NO_BACKEND = re.compile(r"QNN SetupBackend failed ([^\n\x1b]*)")
_NODE = re.compile(r"Operator type: (\w+) Node name: (.*) Node index: \d+")


@dataclass(frozen=True)
class Refused:
    """An operation that does not lower.

    Attributes:
        name: of the node in the ONNX file; ONNX Runtime may have fused it with its neighbour.
        type: e.g. "Erf".
        reason: the compiler's words, or how compiling it alone ended.
    """

    name: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.type}): {self.reason}"


def complaint(source: Path, target: Target, failed: Outcome) -> str:
    """Find out why an ONNX file did not compile.

    First the provider is asked which nodes it takes (its verbose log has the reasons). When it
    takes all and the compiler fails or crashes later, each kind of operation is compiled alone;
    when each of these compiles, the part of the graph before it is added.

    Args:
        source: the ONNX file, already trusted.
        target: what it was compiled for.
        failed: how that ended.

    Returns:
        Which operations do not lower, why, and what to change.
    """
    asked = compile_apart(source, target, fallback=True)
    if unusable := _NO_BACKEND.search(asked.log):
        return (
            f"the HTP backend does not start for {target}: {unusable[1].strip()}. Is soc_model a "
            "number that this version of onnxruntime-qnn knows?"
        )
    refused = _left_to_cpu(asked)
    total = len(asked.operations)
    doubts = doubtful_weights(source)
    if not refused:
        model = onnx.load(source, load_external_data=False)
        if any(named_files(model)):  # a piece would not find its weights, and is too large
            lines = [f"{source.name} does not compile for {target}: {failed.error}", *doubts]
            return "\n".join(lines)
        pieces = _Pieces(model, target)
        refused, total = pieces.failing(), len(pieces.operations)
    if not refused:
        return (
            f"{source.name} does not compile for {target}: {failed.error}. No operation and no "
            "part of the graph fails without the rest: try another htp_arch or a shorter length."
        )
    of = f" of {total}" if total else ""
    lines = [f"{len(refused)}{of} operations of {source.name} do not lower to {target}:"]
    lines += [f"  {r}" for r in refused[:SHOWN]]
    lines += [f"  … and {len(refused) - SHOWN} more"] * (len(refused) > SHOWN)
    kinds = dict.fromkeys(r.type for r in refused)
    # Where a weight's format may be why, the operation itself is nothing to change.
    advised = [kind for kind in kinds if kind in ADVICE or not doubts]
    lines += [f"{kind}: {ADVICE.get(kind, OTHERWISE)}." for kind in advised]
    return "\n".join(lines + doubts)


def _left_to_cpu(asked: Outcome) -> list[Refused]:
    reasons: dict[str, tuple[str, str]] = {}
    for found in _REASON.finditer(asked.log):
        for kind, name in _NODE.findall(found["nodes"]):
            if kind == found["type"]:
                reasons[name] = (kind, found["reason"].strip().split(f".{kind} node")[0])
    if not asked.nodes:  # it did not get as far as to say which nodes it leaves
        return [Refused(name, *why) for name, why in reasons.items()]
    left = [(kind, name) for provider, kind, name in asked.nodes if provider != PROVIDER]
    left = [node for node in left if node[0] not in QUANTIZERS] or left
    why = "the HTP provider left it to the CPU"
    return [Refused(name, kind, reasons.get(name, ("", why))[1]) for kind, name in left]


class _Pieces:
    """Parts of a model, compiled each for itself."""

    def __init__(self, model: ModelProto, target: Target) -> None:
        model = onnx.shape_inference.infer_shapes(model)
        self.target = target
        self.extractor = Extractor(model)
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        constants = {tensor.name for tensor in model.graph.initializer} | {""}
        for node in model.graph.node:
            if all(name in constants for name in node.input):
                constants.update(node.output)
        self.constants = constants
        self.graph_inputs = [x.name for x in model.graph.input]
        self.operations = [
            node
            for node in model.graph.node
            if node.op_type not in QUANTIZERS and not constants.issuperset(node.output)
        ]

    def failing(self) -> list[Refused]:
        """Operations that fail alone, or the first that fails together with all before it."""
        verdicts: dict[str, str | None] = {}
        refused = []
        for node in self.operations:
            kind = self._kind(node)
            if kind not in verdicts:
                verdicts[kind] = self._error(*self._alone(node))
            if error := verdicts[kind]:
                refused.append(Refused(node.name, node.op_type, f"compiled alone, {error}"))
        return refused or self._first_failing()

    def _first_failing(self) -> list[Refused]:
        low, high, last = 0, len(self.operations), None
        while low < high:
            middle = (low + high) // 2
            error = self._error(self.graph_inputs, [self._sink(self.operations[middle])])
            low, high = (low, middle) if error else (middle + 1, high)
            last = error or last
        if last is None:
            return []
        node = self.operations[low]
        return [Refused(node.name, node.op_type, f"the first to fail with all before it: {last}")]

    def _error(self, inputs: list[str], outputs: list[str]) -> str | None:
        """What the compiler says to the nodes between; None when it has no objection."""
        try:
            piece = self.extractor.extract_model(inputs, outputs)
        except ValueError:  # a tensor of unknown shape
            return None
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "piece.onnx")
            onnx.save(piece, file)
            error = compile_apart(file, self.target).error
        # The provider took every node of the whole model: that it leaves this one is the cut's.
        return None if error is None or NO_FALLBACK in error else error.strip()

    def _kind(self, node: NodeProto) -> str:
        """Equal for operations that the compiler treats alike."""
        known = self.extractor.value_infos
        shapes = [str(known[n].type) if n in known else "" for n in (*node.input, *node.output)]
        return "\n".join([node.op_type, *sorted(map(str, node.attribute)), *shapes])

    def _alone(self, node: NodeProto) -> tuple[list[str], list[str]]:
        """Names between which the operation and the quantizers at its sides lie."""
        sources = []
        for name in node.input:
            while name in self.producer and self.producer[name].op_type in QUANTIZERS:
                name = self.producer[name].input[0]
            if name not in self.constants:
                sources.append(name)
        return list(dict.fromkeys(sources)), [self._sink(node)]

    def _sink(self, node: NodeProto) -> str:
        """The operation's output, after its quantizers where it has them."""
        name = node.output[0]
        for kind in ("QuantizeLinear", "DequantizeLinear"):
            after = [n for n in self.consumers.get(name, ()) if n.op_type == kind]
            name = after[0].output[0] if after else name
        return name
