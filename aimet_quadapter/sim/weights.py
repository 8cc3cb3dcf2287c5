"""Weights that stay as they are: without gradients, quantized once for several passes or by rows.

And grids so fine that AIMET need not look whether a weight lies on one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin, base
from aimet_torch.quantization.affine import AffineQuantizerBase
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import patch_attr
from torch import Tensor, nn

from .kernels import vectorized

SEARCH, NOT_FOUND = "_decompose_prequantized_tensor", "_DecompositionError"
"""What AIMET calls for each symmetric weight whose range it sets, and what that raises."""

FINEST = 255
"""Steps of the finest grid that a weight is tried on."""

KEPT = 600 << 20
"""Bytes of quantized weights that are kept from pass to pass, unless told otherwise."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any parameter of the model; flags come back, gradients are gone."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def quantized_once(
    model: nn.Module, limit: float = KEPT, besides: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Let the parameter quantizers of a model give what they give now, without computing it.

    No tensor of the model is touched: a quantizer that is handed its parameter answers with the
    tensor it computed when the context began, so the output stays the same to the bit; handed
    anything else (a weight with α attached), it computes as ever, and a pass with the quantizers
    removed reads the plain weights. Gradients reach neither weights nor their ranges. It takes
    the memory of the quantized weights once more. What else is quantized goes through `vectorized`.

    Args:
        model: a sim's model; its weights and their quantizers must not change in the context.
        limit: bytes that may be kept, of the first weights that fit; the rest is computed in each
            pass. A model with a larger weight keeps none: its peak of memory lies there. `math.inf`
            keeps all.
        besides: modules whose weights are not kept.
    """
    found = _by_quantizer(model, {id(module) for module in besides})
    sizes = [sum(p.numel() * p.element_size() for p in parameters) for _, parameters in found]
    left = limit if max(sizes, default=0) <= limit else 0
    with ExitStack() as stack:
        stack.enter_context(vectorized())
        for (quantizer, parameters), size in zip(found, sizes, strict=True):
            if size > left:
                continue
            left -= size
            with torch.no_grad():
                # A parameter is kept beside what it gives, so that its id stays its own.
                known = {id(p): (p, quantizer(p)) for p in parameters}
            stack.enter_context(patch_attr(quantizer, "forward", _answer(quantizer, known)))
        yield


def by_rows(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings whose rows can be quantized one by one: one range for the table."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and isinstance(module, BaseQuantizationMixin)
        and "forward" not in module.__dict__
        and isinstance(quantizer := module.param_quantizers["weight"], AffineQuantizerBase)
        and quantizer.block_size is None
        and quantizer.min.numel() == 1
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    ]


@contextmanager
def used_rows(embeddings: Collection[nn.Embedding]) -> Iterator[None]:
    """Let embeddings quantize only the rows of their tokens, where the table is not trained.

    The output stays the same to the bit; the gradient of the range is a sum without the zeros of
    the other rows.

    Args:
        embeddings: of `by_rows`.
    """
    with ExitStack() as stack:
        for module in embeddings:
            stack.enter_context(patch_attr(module, "forward", _on_rows(module)))
        yield


@contextmanager
def fine_grids_unsearched() -> Iterator[None]:
    """Let AIMET set ranges without a search for a grid of more than 8 bits.

    `compute_encodings` gives a weight that was quantized before the step of its grid. To find it,
    AIMET (2.42) tries hundreds of steps on all rows at once; it ends early where a row has more
    values than the grid, which with 16 bits never happens. For the embedding of a small model, per
    channel, that is minutes each time. min-max instead is off by 2⁻¹⁶ of the largest value.
    """
    search: Callable[..., Any] | None = getattr(base, SEARCH, None)
    nothing: type[Exception] | None = getattr(base, NOT_FOUND, None)
    if search is None or nothing is None:  # another AIMET
        yield
        return

    def coarse(weight: Tensor, qmin: int, qmax: int, *args: Any, **kwargs: Any) -> Any:
        if qmax - qmin > FINEST:
            raise nothing("not looked for")
        return search(weight, qmin, qmax, *args, **kwargs)

    with patch_attr(base, SEARCH, coarse):
        yield


def _by_quantizer(
    model: nn.Module, besides: Collection[int]
) -> list[tuple[QuantizerBase, list[Tensor]]]:
    """Each parameter quantizer that has its range, with the parameters it quantizes."""
    found: dict[int, tuple[QuantizerBase, list[Tensor]]] = {}
    for module in model.modules():
        if not isinstance(module, BaseQuantizationMixin) or id(module) in besides:
            continue
        for name, quantizer in module.param_quantizers.items():
            parameter = getattr(module, name)
            ready = isinstance(quantizer, QuantizerBase) and quantizer.is_initialized()
            if ready and parameter is not None:
                found.setdefault(id(quantizer), (quantizer, []))[1].append(parameter)
    return list(found.values())


def _on_rows(module: nn.Embedding) -> Callable[[Tensor], Any]:
    compute = module.forward

    def forward(ids: Tensor) -> Any:
        table: Any = module._parameters["weight"]
        if table.requires_grad:
            return compute(ids)
        rows, places = torch.unique(ids, return_inverse=True)
        try:
            module._parameters["weight"] = table[rows]
            return compute(places)
        finally:
            module._parameters["weight"] = table

    return forward


def _answer(
    quantizer: QuantizerBase, known: dict[int, tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    compute = quantizer.forward

    def forward(x: Tensor) -> Tensor:
        return known[id(x)][1] if id(x) in known else compute(x)

    return forward
