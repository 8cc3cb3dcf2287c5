"""Which operation carries the encoding of a tensor that has none where it is made."""

from __future__ import annotations

import itertools
from typing import Any

from aimet_torch.common.quantsim_config.json_config_importer import JsonConfigImporter
from aimet_torch.common.quantsim_config.quantsim_config import _get_config_file

from ..sim.trace import Node, Trace, Value
from .encoding import moves, onnx_types, operands, quantizer

FOLDING = ("Conv", "ConvTranspose", "Gemm")
"""A BatchNorm behind one of these is folded into it; AIMET quantizes the norm's output alone."""


def supergroups(sim: Any) -> list[list[str]]:
    """Lists of ONNX types that the sim's config file quantizes only at their end."""
    config_file = getattr(sim, "_config_file", None)
    config = JsonConfigImporter.import_json_config_file(_get_config_file(config_file))
    groups = [group["op_list"] for group in config.get("supergroups", [])]
    behind = [["BatchNormalization", *rest] for first, *rest in groups if first in FOLDING]
    return [*groups, *behind, *([first, "BatchNormalization"] for first in FOLDING)]


class Carriers:
    """Who carries what in a recording: the ends of supergroups, and the readers of a value.

    Args:
        trace: the recording.
        groups: lists of ONNX types that are quantized only at their end, as of `supergroups`.
    """

    def __init__(self, trace: Trace, groups: list[list[str]]) -> None:
        self.trace = trace
        self._fused_types = {pair for g in groups for pair in itertools.pairwise(g)}

    def folds_into_its_input(self, node: Node) -> bool:
        """Whether an operation is the end of a supergroup with the one before it."""
        made_by = {v.index: n for n in self.trace.nodes for v in n.outputs}
        producer = made_by.get(node.inputs[0].index)
        return producer is not None and self.fused(producer, 0) is node

    def fused(self, node: Node, place: int) -> Node | None:
        """The operation that an operation forms a supergroup with, if its end is quantized."""
        value = node.outputs[place]
        readers = self.trace.readers.get(value.index, [])
        if len(readers) != 1 or value.index in self.trace.outputs:
            return None
        (following,) = readers
        pairs = {(a, b) for a in onnx_types(node) for b in onnx_types(following)}
        if not pairs & self._fused_types or not following.outputs:
            return None
        ends = quantizer(following.module, "output_quantizers", 0) is not None
        return following if ends or self.fused(following, 0) is not None else None

    def carried_by(self, value: Value) -> list[str] | None:
        """Modules whose input quantizer quantizes a value; None if something reads it bare."""
        if value.index in self.trace.outputs:
            return None
        names: list[str] = []
        for reader in self.trace.readers.get(value.index, []):
            places = [i for i, x in enumerate(operands(reader)) if x == value]
            own = [quantizer(reader.module, "input_quantizers", i) for i in places]
            if own and all(q is not None for q in own):
                names.append(reader.name)
            elif moves(reader):
                further = [self.carried_by(v) for v in reader.outputs]
                if any(f is None for f in further):
                    return None
                names += [n for f in further if f for n in f]
            else:
                return None
        return list(dict.fromkeys(names))
