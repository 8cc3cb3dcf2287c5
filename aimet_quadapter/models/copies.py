"""Layers of a HuggingFace model, taken over if they are plain torch modules."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import UnsupportedModelError

WRAPPERS = {
    "OptimizedModule": ("torch.compile", "model._orig_mod"),
    "DataParallel": ("torch.nn.DataParallel", "model.module"),
    "DistributedDataParallel": ("torch's DistributedDataParallel", "model.module"),
    "FullyShardedDataParallel": ("torch's FullyShardedDataParallel", "model.module"),
    "PeftModel": ("peft", "model.merge_and_unload()"),
    "PeftModelForCausalLM": ("peft", "model.merge_and_unload()"),
}
"""Class that holds another model → who made it, and what gives the model back."""


def refuse_wrapped(model: object) -> None:
    """Raise UnsupportedModelError for a model inside another's class; says how to take it out."""
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            maker, unwrap = WRAPPERS[kind.__name__]
            raise UnsupportedModelError(
                f"the model is wrapped by {maker} ({kind.__name__}): pass what is inside, {unwrap}."
            )


def check_module(source: nn.Module, expected: type[nn.Module]) -> None:
    """Refuse a layer that does not compute what a plain `expected` does.

    Raises:
        UnsupportedModelError: `source` is not exactly `expected`, or its forward is patched: an
            adapter or another quantizer sits in its place.
    """
    patched = "forward" in vars(source) and not hasattr(source, "_hf_hook")  # accelerate's is fine
    if type(source) is expected and not patched:
        return
    refuse_wrapped(source)
    kind = type(source)
    named = f"a {kind.__name__} of {kind.__module__}"
    found = "a patched forward" if patched else named
    raise UnsupportedModelError(
        f"found {found} where a plain {expected.__name__} was expected: an adapter or another "
        "quantizer is in its place. Merge adapters (model = model.merge_and_unload()) and load the "
        "model in fp32, bf16 or fp16 first."
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
