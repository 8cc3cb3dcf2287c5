"""Layers of a HuggingFace model, taken over if they are plain torch modules."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import UnsupportedModelError


def check_module(source: nn.Module, expected: type[nn.Module]) -> None:
    """Refuse a layer that does not compute what a plain `expected` does.

    Raises:
        UnsupportedModelError: `source` is not exactly `expected`, or its forward is patched: an
            adapter or another quantizer sits in its place.
    """
    patched = "forward" in vars(source) and not hasattr(source, "_hf_hook")  # accelerate's is fine
    if type(source) is expected and not patched:
        return
    found = "a patched forward" if patched else f"a {type(source).__name__}"
    raise UnsupportedModelError(
        f"found {found} where a plain {expected.__name__} was expected: an adapter or another "
        "quantizer is in its place. Merge adapters and load the model in fp32, bf16 or fp16 first."
    )


def copy_module(source: nn.Module, expected: type[nn.Module]) -> nn.Module:
    """A copy of a plain torch module, with weights of its own and without hooks.

    Raises:
        UnsupportedModelError: see `check_module`.
    """
    check_module(source, expected)
    module = copy.deepcopy(source)
    for name in ("forward", "_old_forward", "_hf_hook"):  # would go around AIMET's quantizers
        vars(module).pop(name, None)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module
