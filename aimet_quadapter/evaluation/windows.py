"""Token ids → calibration samples: random windows that do not overlap."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ..errors import DataError
from ..sim.values import check_ids


def calibration_samples(
    ids: Tensor,
    samples: int,
    length: int,
    seed: int,
    exclude: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
) -> list[Tensor]:
    """Random windows (1, length) that do not overlap, every such choice being equally likely.

    Window i starts at c_i + i · (T − 1), where c is a sorted draw, without replacement, from the
    numbers below N − samples · (T − 1), and T is `length` less the prefix; so they keep the order
    of the text.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        ids: token ids (N,) or (1, N), N ≥ samples · T.
        samples: how many windows.
        length: tokens of a window, the prefix included.
        seed: of the draw.
        exclude: token ids of the evaluation text; no window may occur in it.
        prefix: token ids (P,) that every window begins with, as prompts do: those that
            `prompt_prefix(tokenizer)` gives.

    Raises:
        DataError: no token ids, too few of them, or a window that occurs in `exclude`.
    """
    for name, given in (("ids", ids), ("exclude", exclude), ("prefix", prefix)):
        if given is not None and given.numel():
            check_ids(given, name)
    ids = ids.reshape(-1)
    begin = ids[:0] if prefix is None else prefix.reshape(-1).to(ids)
    length -= len(begin)
    if min(samples, length) < 1 or samples * length > len(ids):
        raise DataError(
            f"{samples} samples of {length} tokens cannot be taken from {len(ids)} tokens without "
            "overlap. Take one or more, fewer or shorter ones, or a longer text."
        )
    draw = sorted(random.Random(seed).sample(range(len(ids) - samples * (length - 1)), samples))
    starts = [place + i * (length - 1) for i, place in enumerate(draw)]
    windows = [ids[start : start + length].clone()[None] for start in starts]
    if exclude is not None and any(_occurs(window, exclude) for window in windows):
        raise DataError(
            "a calibration sample occurs in the evaluation text. Calibrate on another split."
        )
    return [torch.cat((begin[None], window), 1) for window in windows]


def _occurs(window: Tensor, ids: Tensor) -> bool:
    """Whether the ids of a window follow each other in `ids`."""
    needle, hay = (x.reshape(-1).long().cpu().numpy().tobytes() for x in (window, ids))
    at = hay.find(needle)
    while at % 8 and at >= 0:  # not where an id of 8 bytes begins
        at = hay.find(needle, at + 1)
    return at >= 0
