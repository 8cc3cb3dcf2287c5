"""The numerical check that a pair keeps the model what it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import PairError
from ..sim.trace import call, tensors_in
from .attachment import scaled
from .pair import Pair

PROOF_TOLERANCE = 1e-3
"""|difference| / max |output| up to which two fp32 outputs count as equal in a proof."""

HALF = (torch.float16, torch.bfloat16)


def inexact(sim: Any, pairs: Iterable[Pair], inputs: Any, seed: int = 0) -> dict[str, float]:
    """Check numerically that random scales leave the model's output as it is.

    Quantizers off, fp32 and log-uniform α in [0.1, 10]: all pairs at once, then, if the output
    differs by more than `PROOF_TOLERANCE` of its largest value, each alone to find the culprits.

    Args:
        sim: the sim the pairs were found in. It is left as it is.
        pairs: the pairs to check.
        inputs: the model's inputs: a tuple, or a dict of keyword arguments.
        seed: of the random scales.

    Returns:
        name of each pair that is not exact → |difference| / max |output|.

    Raises:
        PairError: there is no finite output to compare, or the pairs are exact one by one only.
    """
    pairs = tuple(pairs)
    if not pairs:
        return {}
    alphas = _random_scales(pairs, seed)
    model = sim.model
    with (
        torch.no_grad(),
        in_eval_mode(model),
        remove_all_quantizers(model),
        _float32(model, inputs) as wide,
    ):
        reference = _reference(model, wide)
        if _difference(model, wide, reference, pairs, alphas) <= PROOF_TOLERANCE:
            return {}
        alone = {p.name: _difference(model, wide, reference, (p,), alphas) for p in pairs}
        failed = {name: d for name, d in alone.items() if not d <= PROOF_TOLERANCE}
        rest = tuple(p for p in pairs if p.name not in failed)
        if _difference(model, wide, reference, rest, alphas) <= PROOF_TOLERANCE:
            return failed
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
            _float32(sim.model, inputs) as wide,
        ):
            return _reference(sim.model, wide)

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
    with scaled(model, pairs, alphas):
        return _relative(_outputs(model, inputs), reference)


def _relative(outputs: list[Tensor], reference: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(outputs, reference, strict=True)
    )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    found = tensors_in(call(model, inputs))
    return [t.float() for t in found if t.is_floating_point() and t.numel()]


@contextmanager
def _float32(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """Hold a half-precision model in fp32 for a while; yields the inputs to match.

    Its own storage comes back afterwards, so bits, ties and views are what they were.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF]
    own = [t.data for t in tensors]

    def widen(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield tree_map(widen, inputs)
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data
