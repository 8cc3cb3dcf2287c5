"""The range of masked scores: how far down it must reach so that what is masked stays hidden."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from aimet_torch.quantization.affine import QuantizeDequantize
from torch import Tensor

from ..models.attention import Attention
from ..sim.sites import set_range
from .visible_rows import visible_rows

VANISHED = 16.0
"""Scores this far below the largest of their row have no part in a softmax.

exp(−16) is 1e-7, a hundredth of the step of a 16-bit softmax.
"""

SLACK = 16.0
"""How far the largest score of a row of new text may lie below that of every row seen."""

Interval = tuple[float, float]


@contextmanager
def largest_scores(
    attentions: Mapping[str, Attention], seen: dict[str, Interval] | None = None
) -> Iterator[dict[str, Interval]]:
    """Watch the largest score of every row that is not padding.

    Args:
        attentions: name → attention.
        seen: what was seen before, to go on from.

    Yields:
        name → (smallest, largest) of them, complete when the context ends.
    """
    found = {n: (float("inf"), -float("inf")) for n in attentions} if seen is None else seen
    with visible_rows(attentions) as visible, ExitStack() as stack:

        def see(name: str, softmax: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().amax(softmax.dim, keepdim=True)
            rows = rows[visible.pop(name).expand_as(rows)]
            if rows.numel():
                low, high = found[name]
                found[name] = min(low, float(rows.min())), max(high, float(rows.max()))

        for name, module in attentions.items():
            handle = module.softmax.register_forward_pre_hook(functools.partial(see, name))
            stack.callback(handle.remove)
        yield found


def raise_lower_end(
    attention: Attention, least: float, largest: float
) -> tuple[Interval | None, Interval | None]:
    """Leave what is masked no more range than it needs to stay hidden.

    Args:
        attention: its masked scores' range is changed in place.
        least: smallest of the rows' largest scores.
        largest: largest score.

    Returns:
        The range before and after; None, None for scores without an integer quantizer.
    """
    q: Any = attention.add_mask.output_quantizers[0]
    if not isinstance(q, QuantizeDequantize):
        return None, None
    was = (q.get_min().item(), q.get_max().item())
    low = least - VANISHED - SLACK
    if q.is_overwrite_allowed() and was[0] < low:
        set_range(q, low, largest)
    return was, (q.get_min().item(), q.get_max().item())
