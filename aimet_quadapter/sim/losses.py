"""The loss of a whole language model on one sample, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor, nn

from ..errors import DataError
from .inputs import Sample
from .outputs import check_vocabulary_of, logits_place, tensors_in


def cross_entropy(model: nn.Module, sample: Sample) -> Tensor:
    """Mean negative log-likelihood of each next token that is not padding."""
    logits, targets = _logits(model, sample), _next_tokens(model, sample)
    check_vocabulary_of(logits, targets)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def distillation(model: nn.Module, sample: Sample) -> Tensor:
    """KL(unquantized ‖ quantized) of the next-token distributions, mean over the tokens."""
    with torch.no_grad(), remove_all_quantizers(model):
        teacher = F.log_softmax(_logits(model, sample), -1)
    student = F.log_softmax(_logits(model, sample), -1)
    kept = _next_tokens(model, sample) != -100
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)[kept].mean()


def _logits(model: nn.Module, sample: Sample) -> Tensor:
    """Logits (B, T − 1, V) of each next token, by `logits_place`."""
    outputs = tensors_in(sample(model))
    place = logits_place(outputs, model)
    if place is None:
        raise DataError(
            "the model returns no logits (batch, length, vocabulary): a loss of the whole model "
            "needs a causal language model."
        )
    return outputs[place][:, :-1].float()


def _next_tokens(model: nn.Module, sample: Sample) -> Tensor:
    """Token ids (B, T − 1), −100 where one or the token before it is padding."""
    named = sample.named(model)
    ids = named.get("input_ids", next(iter(sample.tensors())))
    targets = ids[:, 1:].clone()
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = -100
    return targets


LOSSES: dict[str, Callable[[nn.Module, Sample], Tensor]] = {
    "cross-entropy": cross_entropy,
    "distillation": distillation,
}
