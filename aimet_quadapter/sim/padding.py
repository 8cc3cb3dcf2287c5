"""Padding left out of a sample, where the tokens that are seen give what they gave with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from ..errors import DataError
from .inputs import Sample
from .outputs import tensors_in

SAME = 1e-3
"""Share of the largest output by which a split batch, or one without padding, may differ."""


def without_padding(sample: Sample, model: nn.Module, number: int) -> Sample | None:
    """A sample without the tokens that its attention mask hides from all others.

    A range that padding sets is not the text's. The tokens go from every input of the sample's
    length, a mask of (B or 1, 1, T, T) loses their rows and columns, and the positions of what
    is left are given where the model takes `position_ids` and got none. That the tokens that stay
    give the same outputs is checked.

    Args:
        sample: inputs of the model.
        model: runs in eval mode, without quantizers.
        number: of the batch, for messages.

    Returns:
        The sample, shorter where it had padding; None if no token of it is seen.

    Raises:
        DataError: the mask is none, rows of one sample have their padding in different places, or
            the model computes something else without it.
    """
    mask = sample.named(model).get("attention_mask")
    if not isinstance(mask, Tensor):
        return sample
    seen = _seen(mask, f"attention_mask of batch {number}")  # (B, T)
    if bool(seen.all()):
        return sample
    if bool((seen != seen[:1]).any()):
        raise DataError(
            f"batch {number} has padding in different places of its rows, and its rows cannot be "
            "taken alone: it would count in ranges and losses. Give samples without padding."
        )
    kept = seen[0].nonzero()[:, 0]
    if not kept.numel():
        return None
    short = _shortened(sample, model, kept, seen.shape[1])
    if not _same_outputs(sample, short, model, kept, seen.shape[1]):
        raise DataError(
            f"batch {number} has padding, and without it the model computes something else for the "
            "tokens that are seen: it would count in ranges and losses. Pad on the right, pass "
            "position_ids, or give samples without padding."
        )
    return short


def _seen(mask: Tensor, where: str) -> Tensor:
    """Which tokens of a mask (B, T) or (B or 1, 1, T, T) any other sees, (B, T)."""
    if mask.dim() == 2:
        wrong = (mask != 0) & (mask != 1)
        if bool(wrong.any()):
            raise DataError(
                f"{where} holds {mask[wrong][0].item()}; it is 1 where a token counts and 0 where "
                "it is padding. If the batch is (input, label), give the input alone."
            )
        return mask != 0
    if mask.dim() != 4:
        raise DataError(
            f"{where} has shape {tuple(mask.shape)}; expected (batch, length), or (batch, 1, "
            "length, length)."
        )
    visible = mask if mask.dtype == torch.bool else mask > mask.amax() - HIDDEN_BELOW
    return visible.any(-2)[:, 0]


HIDDEN_BELOW = 16.0
"""An additive mask hides what it puts this far below the rest: exp(−16) is 1e-7."""


def _shortened(sample: Sample, model: nn.Module, kept: Tensor, length: int) -> Sample:
    def shorten(x: Tensor) -> Tensor:
        if x.dim() == 4 and x.shape[-2:] == (length, length):
            return x[..., kept, :][..., kept]
        return x[:, kept] if x.dim() > 1 and x.shape[1] == length else x

    short = sample.map(shorten)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    shifted = not torch.equal(kept, torch.arange(len(kept), device=kept.device))
    if takes and shifted and sample.named(model).get("position_ids") is None:
        begin = len(getattr(model, "prefix", ()))  # a prepared model's positions count it
        return short.with_named(model, position_ids=begin + kept[None])
    return short


def _same_outputs(
    sample: Sample, short: Sample, model: nn.Module, kept: Tensor, length: int
) -> bool:
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        whole = [y for y in tensors_in(sample(model)) if _of_tokens(y, length)]
        try:
            rest = tensors_in(short(model))
        except Exception:  # noqa: BLE001  a model may refuse another length with anything
            return False
    rest = [y for y in rest if _of_tokens(y, len(kept))]
    return (
        bool(whole)
        and len(rest) == len(whole)
        and all(same(a, b[:, kept]) for a, b in zip(rest, whole, strict=True))
    )


def _of_tokens(y: Any, length: int) -> bool:
    return y.is_floating_point() and y.dim() > 1 and y.shape[1] == length


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal but for what rounding in their type does."""
    if a.shape != b.shape:
        return False
    largest = float(b.abs().max()) if b.numel() else 0.0
    allowed = max(SAME, 16 * torch.finfo(b.dtype).eps) * largest
    return bool(((a - b).abs() <= allowed).all())
