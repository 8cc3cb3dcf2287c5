"""Values that nothing can be computed from: NaN, inf, tensors without data, ids that are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DataError, SimError

INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def all_finite(x: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor inf; makes no copy of it."""
    return x.numel() == 0 or all(bool(end.isfinite()) for end in x.detach().aminmax())


def check_weights(model: nn.Module) -> None:
    """Raise SimError unless every parameter has data, all of it finite, and no buffer holds NaN.

    A quantizer makes a number of NaN, so the output does not show it. A buffer may hold −inf: a
    mask does.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SimError(
                f"parameter {name} has no data (device 'meta'): the model is offloaded or was "
                "never loaded. Load it whole."
            )
        if parameter.is_floating_point() and not all_finite(parameter):
            raise SimError(
                f"parameter {name} holds NaN or inf. Check the checkpoint, or load it in a wider "
                "dtype."
            )
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and bool(buffer.isnan().any()):
            raise SimError(f"buffer {name} holds NaN. Check the checkpoint.")


def check_tensor(x: Tensor, where: str, device: torch.device | None = None) -> None:
    """Raise DataError unless a tensor has data, on this device, without NaN or +inf."""
    if x.numel() == 0:
        raise DataError(f"{where} is empty (shape {tuple(x.shape)}). Drop it.")
    if device is not None and x.device != device:
        raise DataError(
            f"{where} is on {x.device}, the model on {device}. Move it: x.to('{device}')."
        )
    if x.is_meta:
        raise DataError(f"{where} has no data (device 'meta'). Give a tensor that holds values.")
    if x.is_floating_point() and bool(x.isnan().any() | x.isposinf().any()):
        raise DataError(f"{where} holds NaN or inf. Clean the data.")


def check_ids(ids: Tensor, where: str) -> None:
    """Raise DataError unless a tensor holds integers."""
    if ids.dtype not in INTEGER_TYPES:
        raise DataError(f"{where} are {ids.dtype}; token ids are integers. Use tokens.long().")
    if ids.is_meta:
        raise DataError(f"{where} have no data (device 'meta'). Give a tensor that holds values.")
