"""What a model returned: its tensors, and which of them are the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import DataError

ROWS_AT_ONCE = 256
"""Positions of logits whose log-softmax is computed together: bounds what it takes in fp32."""


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor in nested containers, dataclasses and HuggingFace outputs, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def logits_place(outputs: Sequence[Tensor], model: nn.Module) -> int | None:
    """Index of the logits (B, T, V) among several outputs; None when none can be.

    The first floats of three dimensions with V = `model.config.vocab_size`; without such, or where
    the model has no such config, the first of three dimensions.
    """
    places = [i for i, y in enumerate(outputs) if y.is_floating_point() and y.dim() == 3]
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    fitting = [i for i in places if outputs[i].shape[-1] == size]
    return next(iter(fitting or places), None)


def check_vocabulary_of(logits: Tensor, ids: Tensor) -> None:
    """Raise DataError if a token id has no logit: what was taken for logits (B, T, V) is not."""
    if ids.numel() and int(ids.max()) >= logits.shape[-1]:
        raise DataError(
            f"the model's first output of three dimensions has {logits.shape[-1]} columns and the "
            f"text holds token {int(ids.max())}: these are no logits. Let the model return its "
            "logits first, or say how many there are in model.config.vocab_size."
        )
