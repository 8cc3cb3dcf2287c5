"""What must hold of a sim before any long work starts."""

from __future__ import annotations

from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import in_eval_mode
from torch import nn

from ..errors import DataError, SimError
from .inputs import Sample
from .kernels import vectorized
from .values import check_weights


def check_sim(sim: Any, quantized: bool = True) -> None:
    """Raise SimError unless this is an AIMET sim with finite weights.

    Args:
        sim: what was given as a sim.
        quantized: whether it must have a quantizer.
    """
    if not isinstance(sim, QuantizationSimModel):
        raise SimError(
            f"expected an aimet_torch.QuantizationSimModel, got {type(sim).__name__}. Create one: "
            "sim = QuantizationSimModel(prepare(model), dummy_input)."
        )
    if quantized and not any(True for _ in sim.quantizers()):
        raise SimError(
            "every quantizer of the sim is off: there is no quantization error to reduce. Create "
            "the sim with a config file that quantizes something, e.g. config_file='default'."
        )
    check_weights(sim.model)


def check_ranges(model: nn.Module, inputs: Any) -> None:
    """Run the model once; raise SimError if it reaches a quantizer that has no range."""
    reached: list[str] = []
    handles = [
        module.register_forward_pre_hook(_Reached(name, reached))
        for name, module in model.named_modules()
        if isinstance(module, QuantizerBase) and not module.is_initialized()
    ]
    try:
        with torch.no_grad(), in_eval_mode(model), vectorized():
            Sample.of(inputs)(model)
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
