"""What is checked in the ONNX and encodings files that `export` wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ..errors import DataError
from .manifest import ENCODINGS, MANIFEST, MODEL, QDQ, changed_files, read_manifest

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}

SMALL = 1 << 16
"""Bytes up to which a constant may be a shape, which other shapes are inferred from."""

QDQ_TYPES = {"QuantizeLinear", "DequantizeLinear"}

DATA_MOVEMENT = {
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
"""Operations whose output holds values of their input and nothing else: its encoding is theirs."""


@dataclass(frozen=True)
class ExportReport:
    """What `check_export` found.

    Attributes:
        operations: number of operations that run on the device, in each ONNX file.
        missing: operations without an encoding on an output: file, node, type.
        unknown: names in the encodings file that the ONNX file does not have.
        changed: files that are missing or not what the manifest says.
    """

    operations: dict[str, int]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.missing or self.unknown or self.changed)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} in {file}" for file, n in self.operations.items())
        lines = [f"device operations: {counts}"]
        for title, found in (
            (
                "without an encoding on their output (the device falls back to float or CPU)",
                self.missing,
            ),
            ("encodings of tensors that the ONNX file does not have", self.unknown),
            ("files changed since the export", self.changed),
        ):
            if found:
                lines += [f"{len(found)} {title}:", *(f"  {line}" for line in found)]
        return "\n".join(lines if not self.ok else [*lines, "every one has its encoding"])


def check_export(
    folder: str | Path, supergroups: Iterable[Sequence[str]] | None = None
) -> ExportReport:
    """Check the files of an export against one another; reads no weights.

    Every name in the encodings file is a tensor of `model.onnx`; every operation that runs on
    the device (not data movement, not integer shape arithmetic, not a constant) has an encoding
    on its outputs, in `model.onnx` by the encodings file, in `model_qdq.onnx` by a QuantizeLinear;
    every file has the SHA-256 in the manifest. A product with a weight and the sum with its bias
    are one operation, a Linear, and so is a supergroup of AIMET's config file: its end carries the
    encoding.

    Args:
        folder: what `export` returned.
        supergroups: lists of ONNX types that are quantized at their end alone; those of the
            manifest when not given.

    Returns:
        What was found; `report.ok` when nothing is wrong, `print(report)` for all of it.

    Raises:
        DataError: a file of the export is not there.
    """
    folder = Path(folder)
    for name in (MODEL, ENCODINGS, QDQ):
        if not (folder / name).is_file():
            raise DataError(f"{folder} has no {name}: pass a folder that export(sim, ...) wrote.")
    if supergroups is None:
        there = (folder / MANIFEST).is_file()
        supergroups = read_manifest(folder).get("supergroups", ()) if there else ()
    fused = {pair for group in supergroups for pair in pairwise(group)}
    names = encoding_names(json.loads((folder / ENCODINGS).read_text(encoding="utf-8")))
    operations, missing = {}, []
    for file in (MODEL, QDQ):
        model = _load(folder / file)
        operations[file], bare = without_encoding(model, names if file == MODEL else None, fused)
        missing += [f"{file}: {line}" for line in bare]
        if file == MODEL:
            unknown = tuple(sorted(names - _tensors(model.graph)))
    return ExportReport(operations, tuple(missing), unknown, _changed(folder))


def encoding_names(encodings: dict[str, Any]) -> set[str]:
    """Names of the tensors that an encodings file of any schema speaks of."""
    if "encodings" in encodings:  # 2.0.0 and later
        return {e["name"] for e in encodings["encodings"]}
    names: set[str] = set()
    for kind in ("activation_encodings", "param_encodings"):
        found = encodings[kind]
        names |= set(found) if isinstance(found, dict) else {e["name"] for e in found}
    return names


def device_operations(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """Each operation that runs on the device, with the output that must carry an encoding.

    Args:
        model: an ONNX model; its weights are not needed.

    Yields:
        The node and the name of the output; a node with two outputs comes twice.
    """
    graph = model.graph
    types = _element_types(model)
    known = constants(graph)
    uses = Counter(name for node in graph.node for name in node.input)
    sums = {
        name
        for node in graph.node
        if node.op_type == "Add" and any(x in known for x in node.input)
        for name in node.input
    }
    for node in graph.node:
        if node.op_type in DATA_MOVEMENT | QDQ_TYPES:
            continue
        for output in node.output:
            if output in known or types.get(output, TensorProto.FLOAT) not in FLOATS:
                continue
            weighted = node.op_type == "MatMul" and any(x in known for x in node.input)
            if weighted and output in sums and uses[output] == 1:
                continue  # the sum with the bias ends this Linear and carries its encoding
            yield node, output


def without_encoding(
    model: ModelProto,
    names: set[str] | None = None,
    fused: Collection[tuple[str, str]] = (),
) -> tuple[int, list[str]]:
    """Count the operations that run on the device; list those without an encoding.

    Args:
        model: an ONNX model; its weights are not needed.
        names: tensors that carry an encoding; None for those that a QuantizeLinear reads.
        fused: types of two operations in a row that are one, with the encoding at its end.

    Returns:
        The number of operations, and "name (type)" of each whose output carries none.
    """
    graph = model.graph
    if names is None:
        names = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    known, ends = constants(graph), {y.name for y in graph.output}

    def carried(node: NodeProto, output: str) -> bool:
        if output in names:
            return True
        behind = readers.get(output, [])
        if output in ends or len(behind) != 1:
            return False
        linear = node.op_type in ("MatMul", "Add") and any(x in known for x in node.input)
        types = {node.op_type, "Gemm"} if linear else {node.op_type}
        one = any((kind, behind[0].op_type) in fused for kind in types)
        return one and carried(behind[0], behind[0].output[0])

    found = list(device_operations(model))
    return len(found), [f"{n.name} ({n.op_type})" for n, out in found if not carried(n, out)]


def _load(file: Path) -> ModelProto:
    """A file's model without its large weights, which the shapes' inference would copy."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > SMALL:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    return model


def _element_types(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {v.name: v.type.tensor_type.elem_type for v in values}


def constants(graph: GraphProto) -> set[str]:
    """Tensors that are known before the model runs."""
    known = {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:  # in topological order, as ONNX demands
        if all(name in known for name in node.input):
            known.update(node.output)
    return known - {""}


def _tensors(graph: GraphProto) -> set[str]:
    named = [*graph.initializer, *graph.input]
    return {t.name for t in named} | {name for node in graph.node for name in node.output}


def _changed(folder: Path) -> tuple[str, ...]:
    """Files that are not what the manifest says; none when there is no manifest yet."""
    if not (folder / MANIFEST).is_file():
        return ()
    return tuple(changed_files(folder, read_manifest(folder)))
