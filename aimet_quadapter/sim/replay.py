"""A recorded forward pass gone through again, a part at a time, no part twice."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .inputs import Sample
from .trace import Node, Trace


class Replay:
    """A sample on its way through the model without quantizers.

    Args:
        model: the model that was recorded.
        trace: a recording on this sample, or on one with the same `form` and `settings`.
        inputs: the inputs, in any form that `Sample.of` takes.

    Attributes:
        place: index of the node that is next.
    """

    def __init__(self, model: nn.Module, trace: Trace, inputs: Any) -> None:
        self.model = model
        self.trace = trace
        self.place = 0
        self._values = dict(enumerate(Sample.of(inputs).map(torch.clone).tensors()))
        self._copies: dict[int, Tensor] = {}

    def until(self, stop: int, keep: Collection[int], later: Collection[int]) -> dict[int, Tensor]:
        """Go on to a node, itself included.

        Args:
            stop: index of the node; where it is behind already, nothing runs.
            keep: indices of the values that are wanted.
            later: indices of those that will be.

        Returns:
            index → a copy of the value as it was when it was made, for each of `keep`.
        """
        wanted = {*keep, *later}
        if not self.place:
            self._copy(self._values, wanted)
        with torch.no_grad(), in_eval_mode(self.model), remove_all_quantizers(self.model):
            for node in self.trace.nodes[self.place : stop + 1]:
                made = self._made(node)
                self._values |= made
                self._copy(made, wanted)
                for value in self.trace.done_after[node.index]:
                    del self._values[value]
        self.place = max(self.place, stop + 1)
        kept = {index: self._copies[index] for index in keep}
        self._copies = {i: x for i, x in self._copies.items() if i in wanted.intersection(later)}
        return kept

    def _copy(self, values: dict[int, Tensor], wanted: Collection[int]) -> None:
        for index in values.keys() & wanted:
            self._copies[index] = values[index].clone()

    def _made(self, node: Node) -> dict[int, Tensor]:
        """Index → each tensor that a node gives; what one writes into, where it gives nothing."""
        out = node.run(self._values)
        if out is None and node.outputs:  # `__setitem__`
            out = self._values[node.inputs[0].index]
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        return {v.index: x for v, x in zip(node.outputs, tensors, strict=True)}
