"""What a loader yields → single samples, checked before any long work starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

Sample = tuple[Any, ...]
"""Positional inputs of the model's forward, batch size 1."""


def as_samples(loader: Iterable[Any], model: nn.Module) -> list[Sample]:
    """All samples of a loader, one by one.

    Args:
        loader: yields what the model takes: a tensor, a tuple of tensors or a dict of keyword
            arguments, batched along the first dimension.
        model: the model the samples are for.

    Raises:
        DataError: no samples, or one that the model cannot take; says which and why.
    """
    samples: list[Sample] = []
    try:
        batches = iter(loader)
    except TypeError as e:
        raise DataError(
            f"expected an iterable of model inputs, got {type(loader).__name__}. Pass a "
            "DataLoader or a list of batches, e.g. [token_ids] with token_ids of shape (B, T)."
        ) from e
    for number, batch in enumerate(batches):
        inputs = _positional(batch, model, number)
        _check_batch(inputs, model, number)
        samples += _split(inputs)
    if not samples:
        raise DataError("the loader yields no samples. Give it at least one batch of inputs.")
    return samples


def _positional(batch: Any, model: nn.Module, number: int) -> Sample:
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    if isinstance(batch, Mapping):
        names = list(inspect.signature(model.forward).parameters)
        unknown = [k for k in batch if k not in names]
        if unknown:
            raise DataError(
                f"batch {number} has the key {unknown[0]!r}, which the model's forward does not "
                f"take (it takes {', '.join(names)}). Drop it from the loader."
            )
        used = names[: 1 + max(names.index(k) for k in batch)]
        return tuple(batch.get(n) for n in used)
    raise DataError(
        f"batch {number} is a {type(batch).__name__}; expected a tensor, a tuple of tensors or a "
        "dict of the forward's arguments."
    )


def _check_batch(inputs: Sample, model: nn.Module, number: int) -> None:
    device = next(model.parameters()).device
    for place, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            continue
        where = f"input {place} of batch {number}"
        if x.numel() == 0:
            raise DataError(f"{where} is empty (shape {tuple(x.shape)}). Drop empty batches.")
        if x.device != device:
            raise DataError(
                f"{where} is on {x.device}, the model on {device}. Move it: x.to('{device}')."
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError(f"{where} holds NaN or inf. Clean the calibration data.")
    if getattr(getattr(model, "config", None), "vocab_size", None) and inputs:
        _check_tokens(inputs[0], model, number)


def _check_tokens(ids: Any, model: nn.Module, number: int) -> None:
    config: Any = model.config
    where = f"batch {number}"
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"{where} has token ids of shape {shape}; expected (batch, length).")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"{where} has token ids of type {ids.dtype}; expected integers (long).")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise DataError(
            f"{where} holds the token id {bad}; the model knows 0 … {config.vocab_size - 1}. Use "
            "the model's own tokenizer."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(
            f"{where} has {ids.shape[1]} tokens a sample; the model takes at most {limit}. Cut "
            "the text into shorter samples."
        )


def _split(inputs: Sample) -> list[Sample]:
    """A batch → samples of batch size 1, if every tensor has the same first dimension."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    sizes = {x.shape[0] for x in tensors if x.dim()}
    if len(sizes) != 1 or any(not x.dim() for x in tensors):
        return [inputs]
    return [
        tuple(x[i : i + 1] if isinstance(x, Tensor) else x for x in inputs)
        for i in range(sizes.pop())
    ]


def stream(loader: Iterable[Any], model: nn.Module) -> Iterator[Sample]:
    """The loader's batches, checked, again and again.

    Raises:
        DataError: no batch at all, one that the model cannot take, or a loader that can be gone
            through only once and has ended.
    """
    while True:
        number = -1
        for number, batch in enumerate(loader):
            inputs = _positional(batch, model, number)
            _check_batch(inputs, model, number)
            yield inputs
        if number < 0:
            raise DataError(
                "the loader yields no batches (or it can be gone through only once and ended). "
                "Pass a DataLoader or a list of batches."
            )
