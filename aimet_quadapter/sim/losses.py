"""The loss of a whole language model on one sample, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor, nn

from .samples import Sample


def cross_entropy(model: nn.Module, sample: Sample) -> Tensor:
    """Mean negative log-likelihood of each next token that is not padding."""
    logits = model(*sample)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), _next_tokens(sample).flatten())


def distillation(model: nn.Module, sample: Sample) -> Tensor:
    """KL(unquantized ‖ quantized) of the next-token distributions, mean over the tokens."""
    with torch.no_grad(), remove_all_quantizers(model):
        teacher = F.log_softmax(model(*sample)[:, :-1].float(), -1)
    student = F.log_softmax(model(*sample)[:, :-1].float(), -1)
    kept = _next_tokens(sample) != -100
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)[kept].mean()


def _next_tokens(sample: Sample) -> Tensor:
    ids = sample[0]
    targets = ids[:, 1:].clone()
    mask = sample[1] if len(sample) > 1 else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = -100
    return targets


LOSSES: dict[str, Callable[[nn.Module, Sample], Tensor]] = {
    "cross-entropy": cross_entropy,
    "distillation": distillation,
}
