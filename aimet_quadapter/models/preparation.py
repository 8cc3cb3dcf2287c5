"""HuggingFace causal LM → an equal module in which every device operation can carry a quantizer."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .copies import refuse_wrapped
from .decoder import PreparedDecoder
from .families import ARCHITECTURES
from .proof import prove

LOG = logging.getLogger(__name__)


def prepare(model: PreTrainedModel) -> PreparedDecoder:
    """Rebuild a HuggingFace causal language model so that AIMET can quantize all of it.

    The result computes the same logits, which is checked on texts of two lengths, one of them
    padded (in fp32, |difference| ≤ 1e-4 of the largest or of 1), is in eval mode, keeps
    HuggingFace's parameter names and goes into `aimet_torch.QuantizationSimModel(model,
    dummy_input)` as any module does. Conv1D becomes Linear; attention, rotary positions, gate ×
    up and the residual sums become modules; a tied `lm_head` gets its own copy of the weight.

    Args:
        model: a `GPT2LMHeadModel` or `LlamaForCausalLM` in fp32, bf16 or fp16. It is not changed.

    Returns:
        The prepared model, on the model's device and in its dtype.

    Raises:
        UnsupportedModelError: the architecture or a feature of its configuration is not known,
            and the message lists everything that is missing; or the logits differ, and it names
            the first module whose output does.
    """
    refuse_wrapped(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or name not in ARCHITECTURES:
        raise UnsupportedModelError(_unknown(model))
    cls = ARCHITECTURES[name]
    missing = cls.missing(model.config)
    if missing:
        raise UnsupportedModelError(
            f"{name} with this configuration cannot be prepared; missing: {'; '.join(missing)}. "
            "Add what is missing to the architecture's file (docs/architectures.md)."
        )
    _refuse_meta(model)
    with torch.no_grad():
        prepared = cls(model)
    reference = next(model.parameters())
    if reference.dtype in (torch.bfloat16, torch.float16):
        LOG.warning(
            "the model is %s: calibrate and evaluate it, but export writes float32 models only. "
            "If you will export, prepare(model.float()).",
            reference.dtype,
        )
    prepared.generation_config = model.generation_config
    prepared = prepared.to(reference.device).eval()
    prove(model, prepared)
    return prepared


def _refuse_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"parameter {name} has no data (device 'meta'): the model is offloaded or was "
                "never loaded. Load it whole, without a device map that offloads."
            )


def _unknown(model: object) -> str:
    known = ", ".join(sorted(ARCHITECTURES))
    lines = [f"{type(model).__name__} cannot be prepared: known are {known}."]
    kin = [c.__name__ for c in type(model).__mro__[1:] if c.__name__ in ARCHITECTURES]
    if kin:
        lines.append(
            f"It is a subclass of {kin[0]} and may compute something else. If it does not, load it "
            f"as one: {kin[0]}.from_pretrained(folder)."
        )
    elif isinstance(model, nn.Module):
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
