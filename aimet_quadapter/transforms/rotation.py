"""The residual stream in another basis: norms into weights, then an orthogonal matrix.

RMSNorm without a weight commutes with a rotation R. So with R in all that reads or writes the
stream a model computes what it did, and a channel that was large is spread over all of them
(QuaRot, Ashkboos et al., 2024; SpinQuant's R1, Liu et al., 2024). No operation is added.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from ..config import ROTATIONS
from ..errors import UnsupportedModelError
from ..models import PreparedDecoder
from ..models.widening import module_by_module_in_float32
from ..sim.values import check_weights
from .orthogonal import orthogonal
from .prefix import set_prefix

TOLERANCE = 1e-4
"""|difference| of two logits in fp32 that count as equal, of the largest."""

ROWS_AT_ONCE = 1 << 14
"""Rows of a table that are in float64 at a time."""

SOME_ROWS = 1 << 10
"""Rows that are turned to see how long that takes."""

Basis = Tensor
"""(C, C), orthogonal, float64: a vector x of the stream becomes xᵀ R."""


@torch.no_grad()
def rotate(
    model: PreparedDecoder, *, kind: str = "hadamard", heads: bool = True, seed: int = 0
) -> None:
    """Turn the residual stream of a prepared model by a random orthogonal matrix, in its weights.

    With R orthogonal, norm weights γ (and β of a LayerNorm) in the projections behind them, and the
    mean that LayerNorm takes off taken off where the stream is written (M = I − 11ᵀ/C):

        W_read ← W_read diag(γ) R,  b_read ← b_read + W_read β
        W_write ← Rᵀ M W_write,     E ← E M R

    so that every norm is an RMSNorm with weights of one: pairs from it to the linears behind it are
    still there. With `heads` also W_v ← R_hᵀ W_v and W_o ← W_o R_h, per head. All products are
    computed in float64; a prefix is computed anew. What becomes of NaN and half precision:
    docs/limits.md.

    Args:
        model: what `prepare` returned, before a sim is made of it; its weights are changed in
            place.
        kind: "hadamard" or "random", see `orthogonal`.
        heads: turn values too, each head by itself.
        seed: of the random numbers.

    Raises:
        UnsupportedModelError: not a prepared model, a sim's model, or one whose stream holds
            something that does not commute with a rotation: a norm behind a branch or of the sum,
            whose weights are in the stream's own basis; a norm of embeddings with positions in
            them; a LayerNorm beside a reader without a norm.
        SimError: its weights hold NaN or inf.
        ValueError: no such kind.
        On any exception the model is as it was.
    """
    check_rotatable(model, kind)
    check_weights(model)
    with _same_logits(model):
        rotate_weights(model, kind, heads, seed)
        if model.prefix:
            set_prefix(model, model.prefix)
    model.rotation = {"kind": kind, "seed": seed, "heads": heads}


@torch.no_grad()
def rotate_weights(model: PreparedDecoder, kind: str, heads: bool, seed: int) -> None:
    """What `rotate` does to weights; what they compute is not looked at, so they may be any."""
    size = model.part("head").in_features
    if model.has("project_out"):
        size = model.part("project_out").in_features
    generator = torch.Generator().manual_seed(seed)
    if model.has("embed_norm"):
        _norm_into_embedding(model)
    _norms_into_readers(model)
    _turn(model, orthogonal(size, kind, generator))
    if heads:
        for block in model.part("blocks"):
            d = block.layer.attention.head_size
            _turn_values(block, orthogonal(d, kind, generator))


@torch.no_grad()
def seconds_to_rotate(model: PreparedDecoder) -> float:
    """How long `rotate` will take, about; 0 for a model that it refuses.

    Some rows are turned and the logits that it compares are computed, and that is scaled to all
    weights; the model is left as it is.
    """
    if _reasons(model):
        return 0.0
    size = model.part("head").in_features
    basis = orthogonal(size, "random", torch.Generator().manual_seed(0))
    basis = basis.to(next(model.parameters()).device)
    some = torch.ones(SOME_ROWS, size, device=basis.device)
    begin = time.perf_counter()
    (some.double() @ basis).to(some.dtype)
    turning = (time.perf_counter() - begin) / some.numel()
    begin = time.perf_counter()
    _logits(model, model.dummy_input(batch=2, length=16))
    comparing = time.perf_counter() - begin
    return turning * sum(p.numel() for p in model.parameters()) + 2 * comparing


def check_rotatable(model: Any, kind: str) -> None:
    """Refuse what `rotate` refuses before it looks at a weight.

    Raises:
        UnsupportedModelError: not a prepared model, a sim's, or a stream that cannot be turned.
        ValueError: no such kind.
    """
    if kind not in ROTATIONS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(map(repr, ROTATIONS))}.")
    if not isinstance(model, PreparedDecoder):
        raise UnsupportedModelError(
            f"only a prepared model is rotated, not a {type(model).__name__}: rotate(prepare("
            "model)), then make the sim."
        )
    if any(isinstance(m, BaseQuantizationMixin) for m in model.modules()):
        raise UnsupportedModelError(
            "the model is a sim's: its ranges are of the stream as it is. Rotate the prepared "
            "model, then make the sim of it."
        )
    reasons = _reasons(model)
    if reasons:
        raise UnsupportedModelError(
            f"the stream of {model.hf_class} cannot be rotated: {'; '.join(reasons)}. Leave the "
            "rotation out; set_prefix and apply_quadapter need none."
        )


def _reasons(model: PreparedDecoder) -> list[str]:
    """What in the stream does not commute with a rotation, in words."""
    layers = model.description.layers
    found = []
    behind = [p for p in ("attn_norm_after", "mlp_norm_after") if any(p in x.parts for x in layers)]
    if behind:
        found.append(
            "norms behind its branches have weights of their own for each channel of the stream "
            f"({', '.join(sorted({x.parts[p] for x in layers for p in behind if p in x.parts}))})"
        )
    if any(p in x.parts for x in layers for p in ("attn_norm_sum", "mlp_norm_sum")):
        found.append("the sums themselves are normed, with a weight for each channel")
    if model.has("embed_norm") and (model.has("positions") or model.has("project_in")):
        found.append("embeddings are normed behind their positions or their projection")
    norms = [part and holder.part(part) for holder, part, _ in _readers(model)]
    if None in norms and any(isinstance(norm, nn.LayerNorm) for norm in norms):
        found.append("a LayerNorm's mean cannot be left out: something reads the stream bare")
    return found


def _readers(model: PreparedDecoder) -> Iterator[tuple[Any, str | None, list[nn.Linear]]]:
    """Holder and part of each norm of the stream, and the projections that read behind it."""
    for block in model.part("blocks"):
        for norm, readers in block.readers():
            yield block, norm, readers
    last = "project_out" if model.has("project_out") else "head"
    yield model, "final_norm" if model.has("final_norm") else None, [model.part(last)]


def _writers(model: PreparedDecoder) -> list[nn.Linear]:
    found = [writer for block in model.part("blocks") for writer in block.writers()]
    return [model.part("project_in"), *found] if model.has("project_in") else found


def _tables(model: PreparedDecoder) -> list[nn.Embedding]:
    """Embeddings that are the stream."""
    embed = [] if model.has("project_in") else [model.part("embed")]
    return [*embed, *([model.part("positions")] if model.has("positions") else [])]


def _norm_into_embedding(model: PreparedDecoder) -> None:
    embed, norm = model.part("embed"), model.part("embed_norm")
    rows = [norm(part) for part in embed.weight.split(ROWS_AT_ONCE)]
    embed.weight = nn.Parameter(torch.cat(rows))
    model.take_out("embed_norm")


def _norms_into_readers(model: PreparedDecoder) -> None:
    """γ and β into the readers, LayerNorm's mean into the writers; norms of weights of one."""
    centred = False
    for holder, part, readers in _readers(model):
        if part is None:
            continue
        norm = holder.part(part)
        centred = centred or isinstance(norm, nn.LayerNorm)
        for reader in readers:
            if getattr(norm, "bias", None) is not None:
                _add_bias(reader, reader.weight.double() @ norm.bias.double())
            if norm.weight is not None:
                _set(reader, "weight", reader.weight.double() * norm.weight.double())
        weight = readers[0].weight
        plain = nn.RMSNorm(norm.normalized_shape, norm.eps, device=weight.device)
        holder.put(part, holder.path(part), plain.to(weight.dtype))
    if centred:
        for table in _tables(model):
            _by_rows(table, lambda x: x - x.mean(-1, keepdim=True))
        for writer in _writers(model):
            weight = writer.weight.double()
            _set(writer, "weight", weight - weight.mean(0))
            if writer.bias is not None:
                _set(writer, "bias", writer.bias.double() - writer.bias.double().mean())


def _turn(model: PreparedDecoder, basis: Basis) -> None:
    basis = basis.to(next(model.parameters()).device)
    for table in _tables(model):
        _by_rows(table, lambda x: x @ basis)
    for writer in _writers(model):
        _set(writer, "weight", basis.T @ writer.weight.double())
        if writer.bias is not None:
            _set(writer, "bias", writer.bias.double() @ basis)
    for _, _, readers in _readers(model):
        for reader in readers:
            _by_rows(reader, lambda x: x @ basis)


def _turn_values(block: Any, basis: Basis) -> None:
    """Values and what reads them, each head in the basis (D, D)."""
    a = block.layer.attention
    value, output = block.part(block.maker_of_values), block.part("o")
    basis = basis.to(value.weight.device)
    size = a.kv_heads * a.head_size  # of a fused projection, the last rows
    for name in ("weight", "bias"):
        parameter = getattr(value, name)
        if parameter is not None:
            whole = parameter.double()
            rows = whole[-size:].view(a.kv_heads, a.head_size, -1)
            turned = (basis.T @ rows).reshape(whole[-size:].shape)
            _set(value, name, torch.cat((whole[:-size], turned)))
    columns = output.weight.double().view(-1, a.heads, a.head_size) @ basis
    _set(output, "weight", columns.flatten(1))


def _by_rows(module: nn.Linear | nn.Embedding, change: Any) -> None:
    """Change a weight some rows at a time."""
    parts = module.weight.split(ROWS_AT_ONCE)
    _set(module, "weight", torch.cat([change(p.double()).to(p.dtype) for p in parts]))


def _add_bias(module: Any, values: Tensor) -> None:
    """Add to a linear's bias; give it one if it has none."""
    old = 0.0 if module.bias is None else module.bias.double()
    module.bias = nn.Parameter((old + values).to(module.weight.dtype))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


@contextmanager
def _same_logits(model: PreparedDecoder) -> Iterator[None]:
    """Compare logits before and after; everything is put back on any exception."""
    before = [(m, dict(m._parameters), dict(m._modules)) for m in model.modules()]
    paths = [(m, dict(m._paths)) for m in (model, *model.part("blocks"))]
    ids = model.dummy_input(batch=2, length=16)
    expected = _logits(model, ids)
    try:
        yield
        difference = (_logits(model, ids) - expected).abs().max() / expected.abs().max()
        allowed = max(TOLERANCE, 16 * torch.finfo(next(model.parameters()).dtype).eps)
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"rotated, {model.hf_class} computes other logits (by {difference:.1e} of the "
                "largest): its weights are too large for its dtype. Prepare it in fp32."
            )
    except BaseException:
        for module, parameters, modules in before:
            module._parameters = parameters
            module._modules = modules
        for module, own in paths:
            module._paths = own
        raise


def _logits(model: PreparedDecoder, ids: Sequence[Tensor]) -> Tensor:
    with in_eval_mode(model), module_by_module_in_float32(model):
        logits: Tensor = model(*ids)
    return logits
