"""HuggingFace causal LM → an equal module in which every device operation can carry a quantizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .decoder import PreparedDecoder
from .description import Decoder
from .families import FAMILIES
from .proof import prove
from .widening import HALF
from .wrappers import refuse_wrapped

NEAREST = 2
"""Readings of an unknown class whose failure is told: those that have all of its parts."""

LOG = logging.getLogger(__name__)


def prepare(model: PreTrainedModel, share: bool = False) -> PreparedDecoder:
    """Rebuild a HuggingFace causal language model so that AIMET can quantize all of it.

    The result computes the same logits, which is checked on texts of two lengths, one of them
    padded (in fp32, |difference| ≤ 1e-4 of the largest or of 1), is in eval mode, keeps
    HuggingFace's parameter names and goes into `aimet_torch.QuantizationSimModel(model,
    dummy_input)` as any module does. Conv1D becomes Linear; fused projections have queries, keys,
    values in this order; factors of the embedding, the branches and the logits and the 1 of
    (1 + weight) norms go into weights; attention, rotary positions, gate × up and the residual sums
    become modules; a tied `lm_head` gets its own copy of the weight.

    A class that no file of `families/` names is read as each of the known ones whose parts it has
    (its own base class first), and prepared if its logits are equal then; a log line says so.

    Args:
        model: a HuggingFace decoder in fp32, bf16 or fp16 (docs/architectures.md lists the
            classes). It is not changed.
        share: hold the memory of the model's own weights wherever they need no other place or
            value, so that they are not there twice, nor in memory at all while they are mapped from
            a checkpoint (docs/limits.md). What writes into weights later (`fold`, `rotate`, a
            trial of `calibrate`) then writes into this model's too, never into its files.

    Returns:
        The prepared model, on the model's device and in its dtype; its rotary tables and scales
        stay in fp32.

    Raises:
        UnsupportedModelError: the architecture or a feature of its configuration is not known,
            and the message lists everything that is missing; or the logits differ, and it names
            the first module whose output does.
    """
    refuse_wrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(_unknown(model))
    _refuse_meta(model)
    name = type(model).__name__
    if name in FAMILIES:
        prepared = _described(model, FAMILIES[name](model.config), share)
    else:
        prepared = _inferred(model, share)
    dtype = next(model.parameters()).dtype
    if dtype in HALF:
        LOG.warning(
            "the model is %s: calibrate and evaluate it, but export writes float32 models only. "
            "If you will export, prepare(model.float()).",
            dtype,
        )
    return prepared


def _described(
    model: PreTrainedModel, description: Decoder, share: bool = False
) -> PreparedDecoder:
    """The model as a description says it, proven.

    Raises:
        UnsupportedModelError: see `prepare`.
    """
    missing = description.unsupported(model.config)
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} with this configuration cannot be prepared; missing: "
            f"{'; '.join(missing)}. Add what is missing to the description "
            "(docs/architectures.md)."
        )
    try:
        with torch.no_grad():
            prepared = PreparedDecoder(model, description, share)
    except (IndexError, RuntimeError) as e:  # of shapes that do not fit
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} do not fit its description: {e}"
        ) from e
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unused = sorted(names - {weight.hf for weight in prepared.weights})
    if unused:
        raise UnsupportedModelError(
            f"{type(model).__name__} has weights that its description does not name: "
            f"{_listed(unused)}. Adapters must be merged first (model = "
            "model.merge_and_unload()); parts of another architecture need a description of their "
            "own (docs/architectures.md)."
        )
    prepared.to(next(model.parameters()).device).eval()
    prove(model, prepared)
    return prepared


def _inferred(model: PreTrainedModel, share: bool) -> PreparedDecoder:
    """The model of an unknown class, read as the first known one that it is equal to.

    Raises:
        UnsupportedModelError: it is equal to none; says what was tried.
    """
    tried: dict[str, str] = {}
    seen: list[Decoder] = []
    for name, description in _readings(model):
        if description in seen:
            continue
        seen.append(description)
        try:
            prepared = _described(model, description, share)
        except UnsupportedModelError as e:
            tried.setdefault(name, str(e))
            continue
        LOG.warning(
            "%s is not a known class: it was read as %s, and its logits are equal then.",
            type(model).__name__,
            name,
        )
        return prepared
    raise UnsupportedModelError(_unknown(model, tried))


def _readings(model: Any) -> Iterator[tuple[str, Decoder]]:
    """What the model would be as each known class, its base classes first.

    And with neighbouring channels rotated in pairs, which no weight's name or size shows.
    """
    kin = [c.__name__ for c in type(model).__mro__ if c.__name__ in FAMILIES]
    for name in dict.fromkeys((*kin, *FAMILIES)):
        try:
            description = FAMILIES[name](model.config)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue  # another architecture's config
        yield name, description
        turned = tuple(
            replace(layer, attention=replace(layer.attention, interleaved=True))
            for layer in description.layers
            if layer.attention.rotary is not None
        )
        if len(turned) == len(description.layers):
            yield f"{name} with interleaved rotary positions", replace(description, layers=turned)


def _refuse_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"parameter {name} has no data (device 'meta'): the model is offloaded or was "
                "never loaded. Load it whole, without a device map that offloads."
            )


def _unknown(model: object, tried: dict[str, str] | None = None) -> str:
    known = ", ".join(sorted(FAMILIES))
    lines = [f"{type(model).__name__} cannot be prepared: known are {known}."]
    near = {n: why for n, why in (tried or {}).items() if "where one was expected" not in why}
    lines += [f"Read as {name}: {why}" for name, why in list(near.items())[:NEAREST]]
    if isinstance(model, nn.Module):
        standard = {"torch.nn", "aimet_torch"}
        unknown = sorted(
            {
                type(m).__name__
                for m in model.modules()
                if not any(type(m).__module__.startswith(s) for s in standard)
            }
        )
        lines.append(f"Modules with no quantizable form yet: {', '.join(unknown) or 'none'}.")
        lines.append(
            "A model that AIMET can already simulate needs no preparation: pass its sim to "
            "find_pairs or apply_quadapter. Otherwise add a file under "
            "aimet_quadapter/models/families/ (docs/architectures.md)."
        )
    else:
        lines.append("Pass a HuggingFace model, e.g. AutoModelForCausalLM.from_pretrained(...).")
    return "\n".join(lines)


def _listed(names: list[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
