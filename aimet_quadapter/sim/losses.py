"""The loss of a whole model: on one sample, by name, or how far it is from its unquantized one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import DataError
from .inputs import Sample
from .outputs import ROWS_AT_ONCE, check_vocabulary_of, logits_place, tensors_in
from .weights import quantized_once


def cross_entropy(model: nn.Module, sample: Sample) -> Tensor:
    """Mean negative log-likelihood of each next token that is not padding."""
    logits, targets = _logits(model, sample).float(), _next_tokens(model, sample)
    check_vocabulary_of(logits, targets)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def distillation(model: nn.Module, sample: Sample) -> Tensor:
    """KL(unquantized ‖ quantized) of the next-token distributions, mean over the tokens."""
    with torch.no_grad(), remove_all_quantizers(model):
        teacher = _logits(model, sample)
    kept = _next_tokens(model, sample) != -100
    return _divergence(_logits(model, sample), teacher)[kept].mean()


class EndLoss:
    """How far a sim is from its unquantized model on some samples, in one number.

    `distillation` where token ids (B, T) give logits (B, T, V); else ‖ŷ − y‖² / ‖y‖², mean over
    the outputs. What the unquantized model gives is kept for the next call, of the first samples
    up to `KEPT` bytes: it must not change between two calls. Samples without a next token are left
    out.

    Args:
        model: a sim's model.
        samples: its inputs.

    Raises:
        DataError: no sample has a next token, on the first call.
    """

    KEPT = 1 << 29

    def __init__(self, model: nn.Module, samples: Sequence[Sample]) -> None:
        self.model = model
        self.samples = samples
        self._expected: dict[int, list[Tensor]] = {}
        self._left = self.KEPT

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the samples; inf where it is NaN."""
        with in_eval_mode(self.model), quantized_once(self.model):
            found = [self._of(i, sample) for i, sample in enumerate(self.samples)]
        values = [value for value in found if value is not None]
        if not values:
            raise DataError(
                "no sample to compare on has a token to predict. Give samples of two tokens or "
                "more, or CalibrationConfig(choice='block')."
            )
        mean = sum(values) / len(values)
        return mean if math.isfinite(mean) else math.inf

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what the unquantized model gives now, of as many samples as fit.

        Weights that are folded later give the same but for rounding; so losses do not depend on
        which fold was the first.
        """
        with in_eval_mode(self.model):
            for index, sample in enumerate(self.samples):
                if self._left:  # once one did not fit, none is kept
                    self._unquantized(index, sample)

    def _unquantized(self, index: int, sample: Sample) -> list[Tensor]:
        expected = self._expected.get(index)
        if expected is None:
            with remove_all_quantizers(self.model):
                expected = self._outputs(sample)
            size = sum(y.numel() * y.element_size() for y in expected)
            if size <= self._left:
                self._left -= size
                self._expected[index] = expected
            else:
                self._left = 0
        return expected

    def _of(self, index: int, sample: Sample) -> float | None:
        got = self._outputs(sample)  # first: quantized weights and both outputs are never together
        expected = self._unquantized(index, sample)
        if self._is_text(sample, got):
            kept = _next_tokens(self.model, sample) != -100
            return float(_divergence(got[0], expected[0])[kept].mean()) if kept.any() else None
        pairs = list(zip(got, expected, strict=True))
        errors = [(a - b).square().mean() / b.square().mean().clamp(min=1e-30) for a, b in pairs]
        return float(torch.stack(errors).mean())

    def _outputs(self, sample: Sample) -> list[Tensor]:
        """Logits (B, T − 1, V) of each next token alone, or every float output."""
        outputs = tensors_in(sample(self.model))
        place = logits_place(outputs, self.model)
        if place is not None and self._is_text(sample, [outputs[place]]):
            return [outputs[place][:, :-1]]
        return [y.float() for y in outputs if y.is_floating_point() and y.numel()]

    def _is_text(self, sample: Sample, outputs: list[Tensor]) -> bool:
        """Whether the sample is token ids (B, T) and the first output has a row for each."""
        ids, rows = _ids(self.model, sample), outputs[0]
        if ids.is_floating_point() or ids.dim() != 2 or rows.dim() != 3:
            return False
        fits = rows.shape[1] in (ids.shape[1], ids.shape[1] - 1)
        return fits and rows.shape[0] == ids.shape[0] and int(ids.max()) < rows.shape[-1]


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each position, of logits (B, T, V); (B, T).

    By parts, each of which is computed once more for its gradient: no probabilities are kept.
    """
    parts = zip(student.split(ROWS_AT_ONCE, 1), teacher.split(ROWS_AT_ONCE, 1), strict=True)
    again = partial(recompute, _of_part, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*part) for part in parts], 1)


def _of_part(student: Tensor, teacher: Tensor) -> Tensor:
    mine, wanted = (F.log_softmax(logits.float(), -1) for logits in (student, teacher))
    return F.kl_div(mine, wanted, log_target=True, reduction="none").sum(-1)


def _logits(model: nn.Module, sample: Sample) -> Tensor:
    """Logits (B, T − 1, V) of each next token, by `logits_place`."""
    outputs = tensors_in(sample(model))
    place = logits_place(outputs, model)
    if place is None:
        raise DataError(
            "the model returns no logits (batch, length, vocabulary): a loss of the whole model "
            "needs a causal language model."
        )
    return outputs[place][:, :-1]


def _next_tokens(model: nn.Module, sample: Sample) -> Tensor:
    """Token ids (B, T − 1), −100 where one or the token before it is padding."""
    targets = _ids(model, sample)[:, 1:].clone()
    mask = sample.named(model).get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = -100
    return targets


def _ids(model: nn.Module, sample: Sample) -> Tensor:
    """What should be the token ids of a sample (B, T)."""
    ids: Tensor = sample.named(model).get("input_ids", next(iter(sample.tensors())))
    return ids


LOSSES: dict[str, Callable[[nn.Module, Sample], Tensor]] = {
    "cross-entropy": cross_entropy,
    "distillation": distillation,
}
