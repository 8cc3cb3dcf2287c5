"""How large each token is at some places of a model: the picture that shows a sink."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from .inputs import Sample


@contextmanager
def outputs_seen(
    model: nn.Module, patterns: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Be given the name and the output of each module whose name fits a pattern, as it runs."""

    def hook(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        see(name, output)

    patterns = tuple(patterns)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        yield


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
    found: dict[str, Tensor] = {}

    def see(name: str, output: Tensor) -> None:
        found[name] = output.detach().float().abs().amax(-1).amax(0).cpu()

    with in_eval_mode(model), remove_all_quantizers(model), outputs_seen(model, patterns, see):
        Sample.of(sample)(model)
    values = torch.stack(list(found.values())) if found else torch.zeros(0, 0)
    return list(found), values
