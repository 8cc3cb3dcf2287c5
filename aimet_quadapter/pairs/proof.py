"""The numerical check that a pair keeps the model what it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn

from ..errors import PairError
from ..models.widening import HALF, Weights, module_by_module_in_float32, own_tensors
from ..sim.inputs import Sample, call
from ..sim.outputs import tensors_in
from ..sim.trace import record
from .attachment import scaled_tensors
from .pair import Pair, Scale, scales_by_module

PROOF_TOLERANCE = 1e-3
"""|difference| / max |output| up to which two fp32 outputs count as equal in a proof."""

NO_SCALES: Mapping[str, list[tuple[Scale, Tensor]]] = MappingProxyType({})


def inexact(
    sim: Any,
    pairs: Iterable[Pair],
    samples: Iterable[Any],
    others: Iterable[Any] = (),
    seed: int = 0,
) -> dict[str, float]:
    """Check numerically that random scales leave the model's output as it is.

    Quantizers off, fp32 and log-uniform α in [0.1, 10]. All pairs at once, then, if the output
    differs by more than `PROOF_TOLERANCE` of its largest value, each alone to find the culprits.

    Args:
        sim: the sim the pairs were found in. It is left as it is.
        pairs: the pairs to check.
        samples: inputs of the model, in any form that `Sample.of` takes.
        others: inputs that it may take, such as `sim.inputs.variations`; left out where it raises.
        seed: of the random scales.

    Returns:
        name of each pair that is not exact → |difference| / max |output|.

    Raises:
        PairError: there is no finite output to compare, it is another one each time, or the pairs
            are exact one by one only.
    """
    left = tuple(pairs)
    if not left:
        return {}
    alphas = _random_scales(left, seed)
    model = sim.model
    failed: dict[str, float] = {}
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        taken = ((inputs, _reference) for inputs in samples)
        for inputs, compute in chain(taken, ((inputs, _try) for inputs in others)):
            wide = Sample.of(inputs).map(_widened)
            with _read_by_functions_in_float32(model, inputs):
                reference = compute(model, wide)
                if reference is not None:
                    failed |= _inexact_on(model, wide, reference, left, alphas)
            left = tuple(p for p in left if p.name not in failed)
    return failed


def _try(model: nn.Module, inputs: Any) -> list[Tensor] | None:
    """Outputs to compare with; None where the model does not take these inputs."""
    try:
        return _reference(model, inputs)
    except Exception:  # noqa: BLE001  a model may refuse what it was not given with anything
        return None


def _inexact_on(
    model: nn.Module,
    inputs: Any,
    reference: list[Tensor],
    pairs: tuple[Pair, ...],
    alphas: dict[str, Tensor],
) -> dict[str, float]:
    if not pairs or _difference(model, inputs, reference, pairs, alphas) <= PROOF_TOLERANCE:
        return {}
    alone = {p.name: _difference(model, inputs, reference, (p,), alphas) for p in pairs}
    failed = {name: d for name, d in alone.items() if not d <= PROOF_TOLERANCE}
    rest = tuple(p for p in pairs if p.name not in failed)
    if _difference(model, inputs, reference, rest, alphas) <= PROOF_TOLERANCE:
        return failed
    if not _difference(model, inputs, reference, (), alphas) <= PROOF_TOLERANCE:
        raise PairError(
            "the model gives another output each time it is run on one input: no pair can be "
            "proven. Turn off what is random or keeps a state."
        )
    raise PairError(
        "the pairs are exact one by one but not together: the model amplifies rounding. Use "
        "fewer pairs at a time (kinds=..., names=...)."
    )


@contextmanager
def unchanged(sim: Any, inputs: Any, what: str) -> Iterator[None]:
    """Check that what the context does to a sim leaves its unquantized output as it is.

    Both outputs are computed in fp32. A half-precision model may differ by what rounding its
    new weights does: 4 times the precision of its type.

    Args:
        sim: the sim.
        inputs: the model's inputs: a tuple, or a dict of keyword arguments.
        what: what the context does, for the message.

    Raises:
        PairError: it does change the output, or there is none to compare.
    """

    def outputs() -> list[Tensor]:
        with (
            torch.no_grad(),
            in_eval_mode(sim.model),
            remove_all_quantizers(sim.model),
            _read_by_functions_in_float32(sim.model, inputs),
        ):
            return _reference(sim.model, Sample.of(inputs).map(_widened))

    reference = outputs()
    yield
    precision = max(torch.finfo(p.dtype).eps for p in sim.model.parameters())
    difference = _relative(outputs(), reference)
    if not difference <= max(PROOF_TOLERANCE, 4 * precision):
        raise PairError(
            f"{what} would change the unquantized model's output by {difference:.2g} of its "
            "largest value: the model is not what its modules say."
        )


def _random_scales(pairs: Iterable[Pair], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return torch.exp((torch.rand(n, generator=generator) * 2 - 1) * math.log(10))

    return {p.name: draw(p.channels) for p in pairs}


def _reference(model: nn.Module, inputs: Any) -> list[Tensor]:
    outputs = _outputs(model, inputs)
    if not outputs:
        raise PairError(
            "the model returns no float tensor that could be compared: no pair can be proven. "
            "Let its forward return tensors, or a tuple, list, dict or dataclass of them."
        )
    if not all(torch.isfinite(t).all() for t in outputs):
        raise PairError(
            "the model's output has NaN or inf with all quantizers off: its weights are broken, "
            "or the dummy input holds NaN or inf. Check both before quantizing."
        )
    return outputs


def _difference(
    model: nn.Module,
    inputs: Any,
    reference: list[Tensor],
    pairs: tuple[Pair, ...],
    alphas: dict[str, Tensor],
) -> float:
    return _relative(_outputs(model, inputs, scales_by_module(pairs, alphas)), reference)


def _relative(outputs: list[Tensor], reference: list[Tensor]) -> float:
    differences = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(outputs, reference, strict=True)
    ]
    return max(differences, key=lambda d: math.inf if math.isnan(d) else d)  # max alone drops NaN


def _outputs(
    model: nn.Module, inputs: Any, scales: Mapping[str, list[tuple[Scale, Tensor]]] = NO_SCALES
) -> list[Tensor]:
    weights = {name: _scaled(model.get_submodule(name), found) for name, found in scales.items()}
    with module_by_module_in_float32(model, weights):
        found = tensors_in(call(model, inputs))
    return [t.float() for t in found if t.is_floating_point() and t.numel()]


def _scaled(module: nn.Module, scales: list[tuple[Scale, Tensor]]) -> Weights:
    """The parameters with α in them; what will be a copy in fp32 by then is written into."""
    copies = {n for n, p in module.named_parameters(recurse=False) if p.dtype in HALF}
    return partial(scaled_tensors, scales=scales, in_place=copies)


@contextmanager
def _read_by_functions_in_float32(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Hold in fp32 for a while what functions read outside the module that owns it."""
    tensors = [t for m in model.modules() for t in own_tensors(m) if t.dtype in HALF]
    if not tensors:
        yield
        return
    try:
        read = {x.untyped_storage().data_ptr() for x, _ in record(model, inputs).constants}
    except Exception:  # noqa: BLE001  inputs that the model does not take read nothing
        read = set()
    own = [(t, t.data) for t in tensors if t.untyped_storage().data_ptr() in read]
    try:
        for tensor, data in own:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x
