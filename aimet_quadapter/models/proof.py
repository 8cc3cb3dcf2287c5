"""What `prepare` promises, checked: the original's logits, behind the mask its own scores need."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import MASK_VALUE, Attention
from .decoder import PreparedDecoder
from .weight_map import Weight
from .widening import HALF, Weights, module_by_module_in_float32

LOG = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""|difference| of two logits in fp32 that count as equal, of the largest where that is above 1."""

LONG, SHORT = 24, 9
"""Lengths of the two texts that are compared: one row, and two of which one is padded."""

LONGEST = 1024
"""The first text is made longer, up to this, to reach past sliding windows."""

Text = tuple[Tensor, Tensor]
"""Token ids and attention mask, (B, T) each."""


@torch.no_grad()
def prove(model: nn.Module, prepared: PreparedDecoder) -> None:
    """Choose the mask's value and compare the prepared model's logits with the original's.

    Both compute in fp32, one module's copy at a time, on random token ids of two lengths, one of
    them with padding on the left; the longer text is longer than a sliding window of up to
    `LONGEST` tokens. Modes are given back.

    Args:
        model: the HuggingFace model.
        prepared: its prepared model; `mask_value` is set.

    Raises:
        UnsupportedModelError: logits differ by more than `TOLERANCE`, with the first module whose
            output does; or the original's are not finite.
    """
    texts = _texts(prepared)
    with _computing_alike(model, prepared):
        try:
            needed = _needed(prepared, texts)
        except (RuntimeError, IndexError) as e:  # of shapes that do not fit
            raise UnsupportedModelError(
                f"{type(model).__name__} is not what its description says: {e}"
            ) from e
        prepared.mask_value = mask_value_for(needed, prepared)
        _compare(model, prepared, texts)


@torch.no_grad()
def compare_logits(model: nn.Module, prepared: PreparedDecoder) -> None:
    """Compare logits of a HuggingFace model and a prepared one, as `prove` does.

    Raises:
        UnsupportedModelError: they differ, with the first module whose output does.
    """
    with _computing_alike(model, prepared):
        _compare(model, prepared, _texts(prepared))


@contextmanager
def _computing_alike(model: Any, prepared: PreparedDecoder) -> Iterator[None]:
    """Both in eval mode and fp32; their heads on the last `LONG` tokens, for heads are large."""

    def last(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, -LONG:],)

    with (
        in_eval_mode(model),
        in_eval_mode(prepared),
        module_by_module_in_float32(model),
        module_by_module_in_float32(prepared, _before_rounding(model, prepared)),
        ExitStack() as stack,
    ):
        for head in (model.get_output_embeddings(), prepared.part("head")):
            stack.callback(head.register_forward_pre_hook(last).remove)
        yield


def _compare(model: nn.Module, prepared: PreparedDecoder, texts: list[Text]) -> None:
    for ids, mask in texts:
        seen = mask[:, -LONG:]
        expected = _original(model, ids, mask)[seen]
        if not expected.isfinite().all():
            raise UnsupportedModelError(
                f"{type(model).__name__} itself gives NaN or inf on {ids.shape[1]} random "
                "tokens: its weights are broken or were not loaded. Check the checkpoint."
            )
        difference = _relative(prepared(ids, mask)[seen], expected)
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"{type(model).__name__} prepared computes other logits (by {difference:.1e} "
                f"of the largest; {TOLERANCE:.0e} is allowed): "
                f"{_first_difference(model, prepared, ids, mask)}."
            )


def mask_value_for(needed: float, model: nn.Module) -> float:
    """−(1.25 · needed + 16) rounded up to tens, at least `MASK_VALUE`.

    Under a mask of −m a hidden token gets at most e^(needed − m) of what the largest seen one of
    its row gets. `needed` is measured on a few tokens; where another text needs a quarter more,
    that is still e^(−16) = 1e-7. No more than this: an 8-bit range spans the mask and the scores.

    Args:
        needed: how far hidden scores lie above the largest seen one of their row, at most.
        model: whose dtype must hold the value.

    Raises:
        UnsupportedModelError: the dtype does not.
    """
    dtype = next(model.parameters()).dtype
    if not needed < torch.finfo(dtype).max / 4:
        raise UnsupportedModelError(
            f"attention scores differ by {needed:.0f} within a row: no mask in {dtype} hides a "
            "token from them. Load the model in float32, or check its weights."
        )
    value = min(MASK_VALUE, -10.0 * math.ceil((1.25 * needed + 16) / 10))
    if value != MASK_VALUE:
        LOG.warning(
            "attention scores differ by up to %.0f within a row, so the mask is %.0f instead of "
            "%.0f. An 8-bit range from there to the largest score has steps of %.1f: give "
            "'*.add_mask' 16 bits, or raise its lower end with compensate_softmax.",
            *(needed, value, MASK_VALUE, -value / 255),
        )
    return value


def _texts(prepared: PreparedDecoder) -> list[Text]:
    """Random token ids of two lengths; the second ones' first row padded on the left."""
    generator = torch.Generator().manual_seed(0)
    device = next(prepared.parameters()).device
    described = prepared.description
    windows = {layer.attention.window or 0 for layer in described.layers}
    past = max((w + SHORT for w in windows if w + SHORT <= LONGEST), default=0)
    texts = []
    for batch, length in ((1, max(LONG, past)), (2, SHORT)):
        shape = (batch, min(length, described.positions or length))
        ids = torch.randint(0, prepared.config.vocab_size, shape, generator=generator)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[0, : (batch - 1) * (shape[1] // 3)] = False
        texts.append((ids.to(device), mask.to(device)))
    return texts


def _needed(prepared: PreparedDecoder, texts: list[Text]) -> float:
    """How far a hidden score lies above the largest seen one of its row, at most; at least 0."""
    prepared.mask_value = hidden = torch.finfo(torch.float32).min / 2
    found = [0.0]

    def see(_: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        scores, seen = args[0], (args[1] > hidden / 2).expand_as(args[0])
        low = torch.finfo(scores.dtype).min
        above = scores.masked_fill(seen, low).amax(-1) - scores.masked_fill(~seen, low).amax(-1)
        rows = above[seen.any(-1) & ~seen.all(-1)]
        if rows.numel():
            found.append(float(rows.max()))

    with ExitStack() as stack:
        for module in prepared.modules():
            if isinstance(module, Attention):
                stack.callback(module.add_mask.register_forward_pre_hook(see).remove)
        for ids, mask in texts:
            prepared(ids, mask)
    return max(found)


def _before_rounding(model: nn.Module, prepared: PreparedDecoder) -> Mapping[str, Weights]:
    """Weights that the prepared model computed from HuggingFace's, as they were in fp32.

    In half precision they are rounded once more; that is not what the proof is about.
    """
    found: dict[str, list[Weight]] = {}
    for weight in prepared.weights:
        if not weight.same and model.get_parameter(weight.hf).dtype in HALF:
            found.setdefault(weight.name.rpartition(".")[0], []).append(weight)

    def exact(weights: list[Weight], _: nn.Module) -> dict[str, Tensor]:
        return {
            w.name.rpartition(".")[2]: nn.Parameter(w.take(model.get_parameter(w.hf).float()))
            for w in weights
        }

    return {name: functools.partial(exact, weights) for name, weights in found.items()}


def _original(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(ids, attention_mask=mask.long(), use_cache=False).logits
    return logits.float()


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def _first_difference(
    model: nn.Module, prepared: PreparedDecoder, ids: Tensor, mask: Tensor
) -> str:
    """The first module, as the prepared model runs them, whose output is not the original's."""
    original: dict[str, Tensor] = {}
    differences: dict[str, float] = {}
    # Layers whose outputs HuggingFace has in another order, or scales elsewhere.
    other = {w.name.rpartition(".")[0] for w in prepared.weights if not w.in_place}

    def compare(name: str, got: Tensor) -> None:
        expected = original.get(name)
        if expected is None or name in other:
            return
        if expected.shape == got.shape and got.shape[:2] == mask.shape:
            differences[name] = _relative(*(t[mask] for t in (got.float(), expected.float())))

    with _outputs_seen(model, original.__setitem__):
        _original(model, ids, mask)
    with _outputs_seen(prepared, compare):
        prepared(ids, mask)
    first = next((n for n, d in differences.items() if not d <= TOLERANCE), None)
    if first is None:
        return "every module that both have is equal, a factor or a cap of the logits is not"
    return f"the first module that differs is {first}"


@contextmanager
def _outputs_seen(model: nn.Module, see: Any) -> Iterator[None]:
    """Call `see(name, tensor)` with the first output, (B, T, …), of every module that runs."""

    def hook(name: str, _: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Mapping):
            first = next(iter(first.values()), None)
        if isinstance(first, Tensor) and first.dim() > 2:
            see(name, first)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(functools.partial(hook, name))
                stack.callback(handle.remove)
        yield
