"""What must hold of a sim, its inputs and the settings before anything is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common.quantsim import VALID_ENCODING_VERSIONS
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from .attach import attached_modules
from .errors import DataError, SimError, UnfoldedError

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
    for name, value in (perplexities or {}).items():
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"perplexity {name!r} is {value!r}: it must be a positive number.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise DataError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: pass a "
            "HuggingFace tokenizer (AutoTokenizer.from_pretrained(...)), or none."
        )


def check_sim(sim: object) -> None:
    """Raise SimError or UnfoldedError unless this is a folded sim in fp32."""
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


def check_ranges(model: nn.Module, args: tuple[Tensor | None, ...]) -> None:
    """Run the model once; raise SimError if it reaches a quantizer that has no range."""
    reached: list[str] = []
    handles = [
        module.register_forward_pre_hook(_Reached(name, reached))
        for name, module in model.named_modules()
        if isinstance(module, QuantizerBase) and not module.is_initialized()
    ]
    try:
        with torch.no_grad(), in_eval_mode(model):
            model(*args)
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        if not reached:
            raise DataError(
                f"{type(model).__name__} does not run on dummy_input: {e}. Pass what the model "
                "takes, e.g. model.dummy_input(length=128)."
            ) from e
    finally:
        for handle in handles:
            handle.remove()
    if reached:
        raise SimError(
            f"the quantizer {reached[0]} has no range. Set the ranges on calibration data, with "
            "the same inputs given: sim.compute_encodings(lambda model: ...)."
        )


class _Reached:
    """A hook that notes the name of the module it hangs on."""

    def __init__(self, name: str, reached: list[str]) -> None:
        self.name = name
        self.reached = reached

    def __call__(self, *_: object) -> None:
        self.reached.append(self.name)
