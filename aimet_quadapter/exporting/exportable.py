"""What must hold of a sim, its inputs and the settings before anything is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common.quantsim import VALID_ENCODING_VERSIONS
from aimet_torch.quantization.affine import QuantizeDequantize

from ..errors import DataError, SimError, UnfoldedError
from ..pairs.attachment import attached_modules
from ..sim.values import check_weights

BITS = (4, 8, 16)
"""Widths of integers that QDQ files of all `OPSETS` hold, with and without a zero point."""

OPSETS = (21, 22, 23)
"""QDQ nodes of 4 and 16 bits exist from 21 on; `RMSNormalization` is one operation from 23 on."""


def check_settings(
    encoding_version: str, opset: int, perplexities: Mapping[str, float] | None, tokenizer: Any
) -> None:
    """Raise ValueError or DataError for a setting that is not possible."""
    if encoding_version not in VALID_ENCODING_VERSIONS:
        raise ValueError(
            f"encoding_version is {encoding_version!r}, AIMET writes "
            f"{', '.join(VALID_ENCODING_VERSIONS)}. Take the one your compiler reads."
        )
    if opset not in OPSETS:
        raise ValueError(
            f"opset is {opset!r}, possible are {', '.join(map(str, OPSETS))}: below 21 there are "
            "no 4- and 16-bit QDQ nodes, above 23 torch's exporter ends. Leave it at 23."
        )
    check_perplexities(perplexities)
    check_tokenizer(tokenizer)


def check_perplexities(perplexities: Mapping[str, float] | None) -> None:
    """Raise ValueError for what is no perplexity."""
    for name, value in (perplexities or {}).items():
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"perplexity {name!r} is {value!r}: it must be a positive number.")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise DataError for what is no tokenizer that can be saved; None is fine."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise DataError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: pass a "
            "HuggingFace tokenizer (AutoTokenizer.from_pretrained(...)), or none."
        )


def check_exportable(sim: object) -> None:
    """Raise SimError or UnfoldedError unless this is a folded sim in fp32 that can be written."""
    if not isinstance(sim, QuantizationSimModel):
        raise SimError(
            f"export takes an aimet_torch.QuantizationSimModel, not a {type(sim).__name__}. "
            "Pass the sim itself, not sim.model."
        )
    carriers = attached_modules(sim)
    if carriers:
        raise UnfoldedError(
            f"α is attached to {', '.join(carriers)}: the files would hold weights without it. "
            "Fold it first: fold(sim)."
        )
    for name, parameter in sim.model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise SimError(
                f"{name} is {parameter.dtype}: AIMET writes QDQ files from float32 models only. "
                "Build the sim from prepare(model.float()) and export that."
            )
    check_weights(sim.model)
    for name, quantizer in sim.named_quantizers():
        _check_format(name, quantizer)


def _check_format(name: str, quantizer: Any) -> None:
    """Raise SimError for an encoding that AIMET simulates and does not write."""
    if not isinstance(quantizer, QuantizeDequantize):
        return
    bits = quantizer.bitwidth
    if bits not in BITS and not (bits == 32 and quantizer.symmetric):
        raise SimError(
            f"{name} has {bits} bits: files hold {', '.join(map(str, BITS))}, and 32 where it is "
            "symmetric. Give it one of these."
        )
    blocks = quantizer.block_size
    if blocks is not None and not any(
        count > 1 and size != 1 for count, size in zip(quantizer.shape, blocks, strict=True)
    ):
        raise SimError(
            f"{name} has blocks as long as a row ({list(blocks)}): that is a range a channel, and "
            "AIMET writes it as such only. Take a shorter block, or no blocks."
        )
