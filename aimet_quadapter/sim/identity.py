"""What a sim computes with, but for ranges that are set anew: for the mark of a checkpoint."""

from __future__ import annotations

from typing import Any

from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor


def identity(sim: Any) -> tuple[list[Any], list[Tensor]]:
    """Settings and tensors that say whether two sims have the same ranges after `set_ranges`.

    The modules and their quantizers, which quantizers are one, how ranges are found and which are
    fixed; weights, buffers and the fixed ends of ranges. Free ends are left out.

    Args:
        sim: an AIMET sim.

    Returns:
        Plain settings, for JSON, and tensors: what `checkpoint.fingerprint` takes.
    """
    first: dict[int, str] = {}
    quantizers, free = [], set()
    for name, module in sim.model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizerBase):
            ends = dict(module.named_parameters())
            anew = [end for end in ends if module.is_overwrite_allowed(end)]
            free |= {id(ends[end]) for end in anew}
            same = first.setdefault(id(module), name)
            quantizers.append([name, same, anew, _how(module)])
    parts = (*sim.model.parameters(), *sim.model.buffers())
    return [repr(sim.model), quantizers], [x for x in parts if id(x) not in free]


def _how(quantizer: QuantizerBase) -> list[Any]:
    """How a quantizer finds its range: the classes and numbers of AIMET's analyzer."""
    found: list[Any] = []
    analyzer = getattr(quantizer, "encoding_analyzer", None)
    for part in filter(None, (analyzer, getattr(analyzer, "observer", None))):
        numbers = {k: v for k, v in vars(part).items() if isinstance(v, int | float)}
        found.append([type(part).__name__, numbers])
    return found
