"""Which parameter of a prepared model lies where in HuggingFace's, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .norms import norm_of
from .widening import module_by_module_in_float32
from .wrappers import refuse_wrapped

LINEAR_TOLERANCE = 1e-5
"""|difference| of a projection's output in fp32 that counts as equal, of the largest."""


@dataclass(frozen=True)
class Weight:
    """prepared = scale · hf[index][rows] + offset, transposed before `rows` where said.

    Attributes:
        name: parameter of the prepared model.
        hf: parameter of HuggingFace's.
        transposed: HuggingFace keeps (in, out), as Conv1D does.
        index: part of HuggingFace's tensor: an expert of a stack, rows behind an offset.
        rows: order of HuggingFace's rows in the prepared tensor.
        scale: a factor that HuggingFace applies elsewhere.
        offset: added to a norm's weight.
    """

    name: str
    hf: str
    transposed: bool = False
    index: Any = ()
    rows: Tensor | None = None
    scale: float = 1.0
    offset: float = 0.0

    def take(self, hf: Tensor, share: bool = False) -> Tensor:
        """HuggingFace's tensor → the prepared model's, a copy in its dtype.

        Args:
            hf: HuggingFace's tensor.
            share: no copy but the tensor's own memory, where it holds just these values in a row.
        """
        part = hf.detach()[self.index]
        part = part.t() if self.transposed else part
        part = part if self.rows is None else part[self.rows.to(part.device)]
        if self.same and share:
            return part.contiguous()
        if self.same:
            return part.clone(memory_format=torch.contiguous_format)
        return (self.scale * part.float() + self.offset).to(hf.dtype)

    @torch.no_grad()
    def give(self, prepared: Tensor, hf: Tensor) -> None:
        """Write the prepared model's tensor into HuggingFace's, in place."""
        part = prepared.detach()
        if not self.same:
            part = (part.float() - self.offset) / self.scale
        if self.rows is not None:
            part = part[torch.argsort(self.rows).to(part.device)]
        part = part.t() if self.transposed else part
        hf[self.index].copy_(part)

    @property
    def same(self) -> bool:
        """Whether the values are HuggingFace's, wherever they lie."""
        return self.scale == 1 and self.offset == 0

    @property
    def in_place(self) -> bool:
        """Whether a module with this weight gives what HuggingFace's module of its name does."""
        return self.scale == 1 and self.rows is None


class WeightMap:
    """Builds the layers of a prepared model from HuggingFace's, and notes where each weight lay.

    Args:
        hf: the HuggingFace model. It is not changed.
        share: whether layers hold the memory of HuggingFace's weights where they are as they were.
            The second of two with one weight (a tied head) gets a copy in any case.
    """

    def __init__(self, hf: nn.Module, share: bool = False) -> None:
        self.hf = hf
        self.share = share
        self.weights: list[Weight] = []
        self._taken: set[int] = set()  # addresses

    def linear(self, path: str, rows: Tensor | None = None, scale: float = 1.0) -> nn.Linear:
        """A projection: plain, Conv1D, or of any class that computes x Wᵀ + b.

        Args:
            path: its name in both models.
            rows: order of its outputs.
            scale: factor of its output.
        """
        source = self.module(path)
        transposed = type(source) is Conv1D
        _check_linear(source, path, transposed)
        how = {"transposed": transposed, "rows": rows, "scale": scale}
        layer = _linear(self._take(path, "weight", **how))
        if getattr(source, "bias", None) is not None:
            layer.bias = self._take(path, "bias", rows=rows, scale=scale)
        return layer

    def router(self, path: str) -> nn.Linear:
        """The scores of experts: a projection whose module does more than project."""
        return _linear(self._take(path, "weight"))

    def expert(
        self, path: str, stack: str, expert: int, rows: slice, scale: float = 1.0
    ) -> nn.Linear:
        """A projection of one expert, `rows` of `stack[expert]`; named `path` in the prepared."""
        how = Weight(f"{path}.weight", stack, index=(expert, rows), scale=scale)
        return _linear(self._parameter(how))

    def embedding(self, path: str, scale: float = 1.0, skip: int = 0) -> nn.Embedding:
        """An embedding.

        Args:
            path: its name in both models.
            scale: factor of its rows, besides the module's own.
            skip: rows that are left out at the beginning.
        """
        source = self.module(path)
        _refuse_patched(source, path)
        if not isinstance(source, nn.Embedding):
            raise _refused(path, source, "an embedding")
        scale *= float(getattr(source, "embed_scale", 1.0))
        index = (slice(skip, None),) if skip else ()
        weight = self._take(path, "weight", scale=scale, index=index)
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        layer.weight = weight
        return layer

    def norm(self, path: str) -> nn.Module:
        """A norm of any class, known by what it computes: `nn.RMSNorm` or `nn.LayerNorm`."""
        source = self.module(path)
        found = norm_of(source)
        if found is None:
            raise _refused(path, source, "an RMSNorm or LayerNorm")
        given = {name for name in ("weight", "bias") if getattr(source, name, None) is not None}
        shape = getattr(source, next(iter(given))).shape if given else source.normalized_shape
        layer: Any
        if found.centred:
            layer = nn.LayerNorm(shape, found.eps, bool(given), bias="bias" in given, device="meta")
        else:
            layer = nn.RMSNorm(shape, found.eps, bool(given), device="meta")
        for name in sorted(given):
            offset = found.offset if name == "weight" else 0.0
            setattr(layer, name, self._take(path, name, offset=offset))
        return layer

    def _take(self, path: str, name: str, **how: Any) -> nn.Parameter:
        return self._parameter(Weight(f"{path}.{name}", f"{path}.{name}", **how))

    def _parameter(self, weight: Weight) -> nn.Parameter:
        self.weights.append(weight)
        source = self.parameter(weight.hf)
        taken = weight.take(source, self.share)
        if taken.data_ptr() in self._taken:
            taken = weight.take(source)
        self._taken.add(taken.data_ptr())
        return nn.Parameter(taken)

    def parameter(self, name: str) -> Tensor:
        """A parameter of HuggingFace's model."""
        try:
            return self.hf.get_parameter(name)
        except AttributeError:
            raise UnsupportedModelError(
                f"the model has no parameter {name}, where one was expected."
            ) from None

    def module(self, path: str) -> Any:
        """A module of HuggingFace's model."""
        try:
            return self.hf.get_submodule(path)
        except AttributeError:
            raise UnsupportedModelError(
                f"the model has no module {path}, where one was expected."
            ) from None


def _linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def _check_linear(source: Any, path: str, transposed: bool) -> None:
    """Refuse a layer that does not compute x Wᵀ + b: an adapter or another quantizer."""
    _refuse_patched(source, path)
    if transposed or type(source) is nn.Linear:
        return
    weight: Any = getattr(source, "weight", None)
    bias = getattr(source, "bias", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    if not plain or any(source.children()):
        raise _refused(path, source, "a plain Linear")
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device)
    with torch.no_grad(), module_by_module_in_float32(source):
        got = source(x)
        expected = nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    if not (got - expected).abs().max() <= LINEAR_TOLERANCE * expected.abs().max():
        raise _refused(path, source, "a plain Linear")


def _refuse_patched(source: Any, path: str) -> None:
    if "forward" in vars(source) and not hasattr(source, "_hf_hook"):  # accelerate's is fine
        raise UnsupportedModelError(
            f"{path} has a patched forward: an adapter or another quantizer sits in its place. "
            "Remove it, or merge it (model = model.merge_and_unload()), and prepare again."
        )


def _refused(path: str, source: nn.Module, expected: str) -> UnsupportedModelError:
    refuse_wrapped(source)
    return UnsupportedModelError(
        f"{path} is a {type(source).__name__} of {type(source).__module__}, where {expected} was "
        "expected: an adapter or another quantizer is in its place. Merge adapters (model = "
        "model.merge_and_unload()) and load the model in fp32, bf16 or fp16 first."
    )
