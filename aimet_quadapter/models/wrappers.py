"""Models inside another's class, and what takes them out."""

from __future__ import annotations

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
