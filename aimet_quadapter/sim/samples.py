"""What a loader yields → single samples without padding, checked before long work starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import DataError
from .inputs import Sample
from .outputs import tensors_in
from .padding import same, without_padding
from .values import check_tensor

MOST_BATCHES = 4096
"""Batches that are read of a loader which does not say how many it has."""


def as_samples(loader: Iterable[Any], model: nn.Module) -> list[Sample]:
    """All samples of a loader, one by one, without the tokens that an attention mask hides.

    A batch is split where that is seen to change nothing: the first and last row of the first
    batch of each form (shapes and all that is no tensor) give the outputs that they give in the
    batch. Else it stays one sample.

    Args:
        loader: yields what the model takes: a tensor, a tuple of positional inputs or a dict of
            inputs by name. One that says no length is read up to `MOST_BATCHES` batches.
        model: the model the samples are for. It runs in eval mode, without quantizers.

    Raises:
        DataError: no samples, one that the model cannot take, an endless loader, or padding that
            cannot be left out; says which and why.
    """
    samples: list[Sample] = []
    splits: dict[Any, bool] = {}
    for number, batch in enumerate(_batches(loader)):
        sample = checked(batch, model, f"batch {number}")
        form = _form(sample)
        if form not in splits:
            splits[form] = _splits(sample, model)
        parts = _rows(sample) if splits[form] else [sample]
        samples += [s for part in parts if (s := without_padding(part, model, number)) is not None]
    if not samples:
        raise DataError("the loader yields no samples. Give it at least one batch of inputs.")
    return samples


def stream(loader: Iterable[Any], model: nn.Module) -> Iterator[Sample]:
    """The loader's batches, checked, again and again; as many as are asked for.

    Raises:
        DataError: no batch at all, one that the model cannot take, or a loader that can be gone
            through only once and has ended.
    """
    while True:
        number = -1
        for number, batch in enumerate(loader):
            yield checked(batch, model, f"batch {number}")
        if number < 0:
            raise DataError(
                "the loader yields no batches (or it can be gone through only once and ended). "
                "Pass a DataLoader or a list of batches."
            )


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    try:
        batches = iter(loader)
    except TypeError as e:
        raise DataError(
            f"expected an iterable of model inputs, got {type(loader).__name__}. Pass a "
            "DataLoader or a list of batches, e.g. [token_ids] with token_ids of shape (B, T)."
        ) from e
    for number, batch in enumerate(batches):
        if number == MOST_BATCHES and _length(loader) is None:
            raise DataError(
                f"the loader has yielded {MOST_BATCHES} batches, does not say how many it has and "
                "goes on. Cut it to what calibration needs: list(itertools.islice(loader, 8))."
            )
        yield batch


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has; a DataLoader of a stream has `len` and raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def checked(batch: Any, model: nn.Module, where: str) -> Sample:
    """Inputs of one call as the model takes them.

    Args:
        batch: in any form that `Sample.of` takes.
        model: whose they are.
        where: what they are called in a message.

    Raises:
        DataError: the forward does not take them, or they are empty, on another device, hold NaN
            or inf, or token ids that the model has not.
    """
    if not isinstance(batch, (Tensor, tuple, list, Mapping, Sample)):
        raise DataError(
            f"{where} is a {type(batch).__name__}; expected a tensor, a tuple of tensors "
            "or a dict of the forward's arguments."
        )
    sample = Sample.of(batch)
    try:
        named = sample.named(model)
    except TypeError as e:
        raise DataError(_not_taken(sample, model, where, e)) from e
    device = next((p.device for p in model.parameters()), None)
    for place, x in enumerate(sample.tensors()):
        check_tensor(x, f"input {place} of {where}", device)
    config = getattr(model, "config", None)
    first = next(iter(named.items()), None)
    if first is not None and getattr(config, "vocab_size", None):
        _check_tokens(*first, config, where)
    return sample


def _not_taken(sample: Sample, model: nn.Module, where: str, error: TypeError) -> str:
    names = list(inspect.signature(model.forward).parameters)
    unknown = [k for k in sample.kwargs if k not in names]
    if unknown:
        return (
            f"{where} has the key {unknown[0]!r}, which the model's forward does not take "
            f"(it takes {', '.join(names)}). Drop it from the loader."
        )
    if len(sample.args) > len(names):
        return (
            f"{where} is a tuple of {len(sample.args)}, the model's forward takes "
            f"{', '.join(names) or 'nothing'}. If the last is a label, drop it: (x for x, _ in "
            "loader)."
        )
    return f"{where} is not what the model's forward takes: {error}."


def _check_tokens(name: str, ids: Any, config: Any, where: str) -> None:
    """Check what a language model's first input says it is: token ids, or something else."""
    floats = isinstance(ids, Tensor) and ids.is_floating_point()
    if name != "input_ids" and (floats or not isinstance(ids, Tensor)):
        return  # embeddings, features
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"{where} has token ids of shape {shape}; expected (batch, length).")
    if floats or ids.dtype == torch.bool:
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


def _form(sample: Sample) -> str:
    """All of a sample but the values of its tensors."""

    def form(x: Any) -> Any:
        return (x.shape, x.dtype) if isinstance(x, Tensor) else x

    return repr(tree_map(form, (sample.args, dict(sample.kwargs))))


def _batch_size(sample: Sample) -> int | None:
    """The first dimension of every tensor, if it is one and the same."""
    sizes = {x.shape[0] if x.dim() else None for x in sample.tensors()}
    return sizes.pop() if len(sizes) == 1 else None


def _rows(sample: Sample) -> list[Sample]:
    return [_row(sample, place) for place in range(_batch_size(sample) or 0)]


def _row(sample: Sample, place: int) -> Sample:
    return sample.map(lambda x: x[place : place + 1])


def _splits(sample: Sample, model: nn.Module) -> bool:
    """Whether the rows of a batch give alone what they give in it."""
    size = _batch_size(sample)
    if size is None:
        return False
    if size == 1:
        return True
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        whole = [y for y in tensors_in(sample(model)) if y.is_floating_point() and y.dim()]
        if not whole or any(y.shape[0] != size for y in whole):
            return False
        for place in (0, size - 1):
            try:
                alone = tensors_in(_row(sample, place)(model))
            except Exception:  # noqa: BLE001  a model may refuse one row with anything
                return False
            rows = [y for y in alone if y.is_floating_point() and y.dim()]
            if len(rows) != len(whole) or not all(
                same(row, y[place : place + 1]) for row, y in zip(rows, whole, strict=True)
            ):
                return False
    return True
