"""Whether an adapter computes on the folded base what it did on the original: both run in peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, of_extra
from ..models import PreparedDecoder
from .checkpoint_folder import checkpoint_of

TOLERANCE = 1e-3
"""|difference| of two logits in fp32 that count as equal, of the largest: a rotation and a
checkpoint may each have taken a tenth of it."""

TOKENS = 24


def peft_model() -> Any:
    """The class that loads adapters.

    Raises:
        MissingRuntimeError: peft is not installed.
    """
    with of_extra("lora", ("peft", "accelerate"), "loads the adapters to compare them"):
        from peft import PeftModel
    return PeftModel


def compare_adapters(
    hf_model: PreTrainedModel, adapter: Path, model: PreparedDecoder, folded: Path
) -> None:
    """Compare the original with its adapter and the folded base with the folded one.

    Args:
        hf_model: the original.
        adapter: folder of its adapter.
        model: the folded sim's.
        folded: folder of the adapter for what `save_huggingface` makes of it.

    Raises:
        UnsupportedModelError: their logits differ by more than `TOLERANCE`.
        MissingRuntimeError: peft is not installed.
    """
    expected = _logits(copy.deepcopy(hf_model), adapter)
    got = _logits(checkpoint_of(model, hf_model), folded)
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"the adapter of {adapter} computes other logits on the folded base (by "
            f"{difference:.1e} of the largest; {TOLERANCE:.0e} is allowed). Something besides "
            "scales and a rotation changed the weights or biases: fold it before that "
            "(compensate_softmax, where the adapter changes the output projection; training of "
            "weights)."
        )


@torch.no_grad()
def _logits(base: Any, adapter: Path) -> Tensor:
    """Logits (1, T, V) of a base, which is changed, and an adapter on random tokens."""
    device = next(base.parameters()).device
    adapted = peft_model().from_pretrained(base, adapter, torch_device=str(device)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS), generator=generator)
    logits: Tensor = adapted(input_ids=ids.to(device), use_cache=False).logits
    return logits
