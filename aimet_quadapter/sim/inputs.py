"""The inputs that a sim can be traced with when none are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SimError


def example_inputs(sim: Any, dummy_input: Any = None) -> Any:
    """The inputs to trace a sim with: the given ones, the model's own, or random floats.

    Args:
        sim: an AIMET `QuantizationSimModel`.
        dummy_input: a tensor, a tuple or list of positional arguments, a dict of keyword
            arguments, or None.

    Returns:
        A tuple or a dict.

    Raises:
        SimError: not a sim, or an input is needed and was not given.
    """
    if not hasattr(sim, "model") or not hasattr(sim, "connected_graph"):
        raise SimError(
            f"expected an aimet_torch.QuantizationSimModel, got {type(sim).__name__}. Create one: "
            "sim = QuantizationSimModel(model, dummy_input)."
        )
    if dummy_input is not None:
        if isinstance(dummy_input, (tuple, list)):
            return tuple(dummy_input)
        return dict(dummy_input) if isinstance(dummy_input, Mapping) else (dummy_input,)
    if hasattr(sim.model, "dummy_input"):
        return sim.model.dummy_input(batch=2)
    shapes = _graph_inputs(sim)
    if not shapes or any(isinstance(m, nn.Embedding) for m in sim.model.modules()):
        raise SimError(
            "the sim does not tell what its model takes. Pass the dummy input the sim was made "
            "with: find_pairs(sim, dummy_input)."
        )
    weight = next(p for p in sim.model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(weight) for s in shapes)


def _graph_inputs(sim: Any) -> list[tuple[int, ...]]:
    """Shapes of the model's inputs; empty if the graph does not show all of them.

    AIMET makes a product for each reader of an input, named `input_<number>_to_<reader>`.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    for op in sim.connected_graph.ordered_ops:
        for product in op.inputs:
            match = re.match(r"input_(\d+)_to_", product.name)
            if product.is_model_input and match:
                shapes[int(match[1])] = tuple(product.shape)
    return [shapes[i] for i in sorted(shapes)] if set(shapes) == set(range(len(shapes))) else []
