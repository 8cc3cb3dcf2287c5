"""How large each token is at some places of a model: the picture that shows a sink."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from .inputs import Sample


@torch.no_grad()
def largest_by_token(
    model: nn.Module, patterns: Iterable[str], sample: Any
) -> tuple[list[str], Tensor]:
    """Largest |x| of each token in the outputs of some modules, unquantized.

    Args:
        model: a prepared model, or a sim's; its quantizers are removed for a while.
        patterns: names of modules that give (B, T, C), such as `residual_sums` of a prepared model.
        sample: inputs of one call; of several rows the largest counts.

    Returns:
        The modules that ran, in order, and their values (modules, T), on the CPU.
    """
    patterns = tuple(patterns)
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            found[name] = output.detach().float().abs().amax(-1).amax(0).cpu()

        return module.register_forward_hook(see)

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in patterns)
    ]
    try:
        with in_eval_mode(model), remove_all_quantizers(model):
            Sample.of(sample)(model)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.stack(list(found.values())) if found else torch.zeros(0, 0)
    return list(found), values
