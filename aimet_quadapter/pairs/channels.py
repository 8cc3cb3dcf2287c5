"""The range of each channel of a pair, as its consumer reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from ..sim.inputs import Sample
from .pair import Pair, channel_dim


@torch.no_grad()
def channel_ends(
    model: nn.Module, pairs: Iterable[Pair], samples: Sequence[Any]
) -> dict[str, Tensor]:
    """Minimum and maximum of each channel that a pair's first consumer reads, unquantized.

    Where several input channels of the consumer share one α (grouped-query attention), the range
    is that of all of them. Folding α multiplies both ends by α.

    Args:
        model: a prepared model, or a sim's; its quantizers are removed for a while.
        pairs: whose channels.
        samples: inputs of the model.

    Returns:
        Pair name → (2, channels), on the CPU; without a pair whose consumer reads no token.
    """
    pairs = tuple(pairs)
    found: dict[str, Tensor] = {}

    def watch(pair: Pair, module: nn.Module) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            if x.numel():
                ends = _ends(pair, x.movedim(channel_dim(module, x.dim()), -1))
                known = found.get(pair.name, ends)
                low, high = torch.minimum(known[0], ends[0]), torch.maximum(known[1], ends[1])
                found[pair.name] = torch.stack((low, high))

        return module.register_forward_pre_hook(see)

    handles = [watch(pair, model.get_submodule(pair.consumers[0])) for pair in pairs]
    try:
        with in_eval_mode(model), remove_all_quantizers(model):
            for sample in samples if pairs else ():
                Sample.of(sample)(model)
    finally:
        for handle in handles:
            handle.remove()
    return {pair.name: found[pair.name].cpu() for pair in pairs if pair.name in found}


def _ends(pair: Pair, x: Tensor) -> Tensor:
    """Of inputs (…, input channels) of the first consumer; (2, channels)."""
    rows = x.flatten(0, -2)
    columns = pair.columns[0].to(rows.device)
    scaled = columns >= 0
    low = rows.new_full((pair.channels,), torch.inf)
    high = -low
    low.scatter_reduce_(0, columns[scaled], rows.amin(0)[scaled], "amin")
    high.scatter_reduce_(0, columns[scaled], rows.amax(0)[scaled], "amax")
    return torch.stack((low, high))
