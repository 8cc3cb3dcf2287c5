"""Which rows of an attention count: those that see anything."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..models.attention import MASK_VALUE, Attention


@contextmanager
def visible_rows(attentions: Mapping[str, Attention]) -> Iterator[dict[str, Tensor]]:
    """Watch which rows each mask leaves something to see: a padding token's is hidden whole.

    Args:
        attentions: name → attention.

    Yields:
        name → rows of the call under way (B or 1, 1, T, 1), from its mask on; whoever has read
        them takes them out (`pop`).
    """
    visible: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        visible[name] = args[1].amax(-1, keepdim=True) > MASK_VALUE / 2

    with ExitStack() as stack:
        for name, module in attentions.items():
            hook = functools.partial(see, name)
            stack.callback(module.add_mask.register_forward_pre_hook(hook).remove)
        yield visible
