"""How labels of channels pass an operation: which operations commute with a scale per channel.

A scale per channel passes data movement, positively homogeneous functions (ReLU and kin), pools
that act on each channel alone, the product with something that is not scaled, and a matrix
product that does not sum over scaled channels. Everything else blocks it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from aimet_torch.nn.modules import custom
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..models.norms import norm_of
from ..models.prepended import Prepended
from ..sim.operations import (
    ATTENTION,
    KEEPS,
    MATMULS,
    MEANS,
    MODULE_KEEPS,
    MODULE_MOVES,
    MODULE_POOLS,
    MOVES,
    POOL,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
)
from ..sim.outputs import tensors_in
from ..sim.trace import Node, Value

UNLABELLED = -1


def distinct(labels: Tensor) -> list[int]:
    """The labels that occur, in order; counted, as sorting all of them takes ten times as long."""
    counts = torch.bincount(labels.flatten().long() - UNLABELLED)
    found: list[int] = (counts.nonzero().flatten() + UNLABELLED).tolist()
    return found


class Blocked(Exception):
    """The labels end here; the message says why."""


Labels = dict[int, Tensor]


@dataclass
class Step:
    """One operation, the labels so far, and the channels blocked so far with the reason."""

    node: Node
    labels: Labels
    blocked: dict[int, str]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def shape(self) -> torch.Size:
        return self.node.shapes[0]

    def operands(self) -> list[Tensor | None]:
        """Labels of each tensor argument, None where there are none."""
        leaves = tree_leaves((self.node.args, self.node.kwargs))
        values = [v for v in leaves if isinstance(v, (Value, Tensor))]
        return [self.labels.get(v.index) if isinstance(v, Value) else None for v in values]

    def only(self) -> Tensor:
        """Labels of the first tensor argument, which must be the only one that has any."""
        first, *others = self.operands()
        if first is None or any(x is not None for x in others):
            raise Blocked(f"{self.name} reads it other than as its first argument")
        return first

    def all_blocked(self, labels: Tensor) -> bool:
        """Whether nothing with these labels is scaled."""
        return set(distinct(labels)) <= {UNLABELLED, *self.blocked}

    def dtypes(self) -> list[torch.dtype]:
        """Every dtype that it is called with."""
        leaves = tree_leaves((self.node.args, self.node.kwargs))
        return [x for x in leaves if isinstance(x, torch.dtype)]

    def refuse_integers(self) -> None:
        """Block what is called with a dtype that is not one of floats."""
        if not all(d.is_floating_point for d in self.dtypes()):
            raise Blocked(f"{self.name} rounds it to integers")

    def result(self, labels: Tensor) -> Labels:
        """`labels` as those of the operation's first output."""
        return {self.node.outputs[0].index: labels}


Rule = Callable[[Step], Labels]


def carry(node: Node, labels: Labels, blocked: dict[int, str]) -> Labels:
    """Labels of a node's outputs from those of its inputs.

    Args:
        node: an operation that reads at least one labelled value.
        labels: value → labels, the shape of the value, −1 where nothing is scaled.
        blocked: channel → reason; channels that this operation blocks are added.

    Raises:
        Blocked: the operation lets no channel pass.
    """
    rule = _module_rule(node.module) if node.module else _function_rule(node.name)
    return rule(Step(node, labels, blocked))


def _module_rule(module: nn.Module) -> Rule:
    for classes, rule in MODULE_RULES:
        if isinstance(module, classes):
            return rule
    return _refuse


def _function_rule(name: str) -> Rule:
    for names, rule in FUNCTION_RULES:
        if name in names:
            return rule
    return _pool if POOL.fullmatch(name) else _refuse


def _refuse(step: Step) -> Labels:
    module = step.node.module
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or (module and norm_of(module)):
        raise Blocked(f"{step.name} normalizes over the channels, so their scales do not pass it")
    what = f"{step.name} ({_class_name(module)})" if module else f"{step.name}()"
    raise Blocked(f"{what} does not commute with a scale per channel")


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Quantized")


def _move(step: Step) -> Labels:
    if any(x is None for x in step.operands()):
        raise Blocked(f"{step.name} joins it with something that is not scaled")
    if step.dtypes():
        raise Blocked(f"{step.name} reads its bits as another type")
    if step.name == "view":  # the labels' memory may lie otherwise than the tensor's
        (found,) = [x for x in step.operands() if x is not None]
        return step.result(found.reshape(step.shape))
    out = tensors_in(step.node.run(step.labels))
    return dict(zip((v.index for v in step.node.outputs), out, strict=True))


def _prepend(step: Step) -> Labels:
    """(B, K, T, D) → (B, K, P + T, D): the constants have the labels of any token."""
    found = step.only()
    first = found[:1, :, :1]
    if (found != first).any():
        raise Blocked("its channels are not the same for every token behind a prefix")
    return step.result(first.expand(step.shape).clone())


def _keep(step: Step) -> Labels:
    step.refuse_integers()
    return step.result(step.only())


def _pool(step: Step) -> Labels:
    found = step.only()
    name = type(step.node.module).__name__ if step.node.module else step.name
    match = POOL.search(name)
    assert match is not None
    pooled = int(match[3])
    flat = found.flatten(-pooled)  # (…, C, H·W)
    if (flat != flat[..., :1]).any():
        raise Blocked(f"{step.name} pools over several of its channels")
    shape = step.shape
    first = flat[..., 0].reshape(*shape[:-pooled], *[1] * pooled)
    return step.result(first.expand(shape).clone())


def _mean(step: Step) -> Labels:
    step.refuse_integers()
    found = step.only()
    given = dict(zip(("dim", "keepdim"), step.node.args[1:], strict=False)) | step.node.kwargs
    dim, keepdim = given.get("dim", given.get("axis")), given.get("keepdim", False)
    low, high = (f(found, () if dim is None else dim, keepdim) for f in (torch.amin, torch.amax))
    if (low != high).any():
        raise Blocked(f"{step.name} sums over several of its channels")
    return step.result(low)


def _product(step: Step) -> Labels:
    both = [x for x in step.operands() if x is not None]
    # A blocked channel is not scaled, so it may multiply one that is (gate × up of one layer).
    found = [x for x in both if not step.all_blocked(x)] or both[:1]
    if len(found) != 1:
        raise Blocked(f"{step.name} multiplies it with itself")
    return step.result(found[0].broadcast_to(step.shape).clone())


def _quotient(step: Step) -> Labels:
    if step.node.kwargs.get("rounding_mode"):
        raise Blocked(f"{step.name} rounds it")
    found = step.only()
    if not (step.node.args and isinstance(step.node.args[0], Value)):
        raise Blocked(f"{step.name} divides by it")
    return step.result(found.broadcast_to(step.shape).clone())


def _sum(step: Step) -> Labels:
    both = step.operands()
    if len(both) != 2 or any(x is None for x in both):
        raise Blocked(f"{step.name} adds it to something that is not scaled (a residual branch)")
    left, right = (x.broadcast_to(step.shape) for x in both if x is not None)
    for channel in distinct(torch.cat([left[left != right], right[left != right]])):
        step.blocked.setdefault(channel, f"{step.name} adds different channels of it")
    return step.result(left.clone())


def _matmul(step: Step) -> Labels:
    """(…, T, S) @ (…, S, D): the labels of the one scaled operand must not vary along S.

    The other operand may be a vector (S,): S is then gone from the result.
    """
    both = step.operands()
    if len(both) != 2 or all(x is not None for x in both):
        raise Blocked(f"{step.name} multiplies it with itself")
    position = 0 if both[0] is not None else 1
    found = both[position]
    assert found is not None
    if found.dim() < 2:
        raise Blocked(f"{step.name} sums over its channels")
    summed = -1 if position == 0 else -2
    first = found.narrow(summed, 0, 1)
    if (found != first).any():
        raise Blocked(f"{step.name} sums over its channels")
    if len(step.shape) < first.dim():
        first = first.squeeze(summed)
    return step.result(first.broadcast_to(step.shape).clone())


def _attention(step: Step) -> Labels:
    """softmax(QKᵀ) V: a scale of V passes, one of Q, K or the mask does not."""
    names = ("query", "key", "value")
    given = dict(zip(names, step.node.args, strict=False)) | step.node.kwargs
    value = given.pop("value")
    for other in [*given.values(), *step.node.args[3:]]:
        if isinstance(other, Value) and other.index in step.labels:
            for channel in distinct(step.labels[other.index]):
                step.blocked.setdefault(channel, f"{step.name} takes a softmax of it")
    found = step.labels.get(value.index) if isinstance(value, Value) else None
    if found is None:
        return {}
    first = found.narrow(-2, 0, 1)
    if (found != first).any():
        raise Blocked(f"{step.name} sums over its channels")
    shape = step.shape
    if first.dim() > 2 and first.shape[-3] != shape[-3]:  # enable_gqa
        first = first.repeat_interleave(shape[-3] // first.shape[-3], dim=-3)
    return step.result(first.broadcast_to(shape).clone())


MODULE_RULES: tuple[tuple[tuple[type[nn.Module], ...], Rule], ...] = (
    (MODULE_MOVES, _move),
    ((Prepended,), _prepend),
    (MODULE_KEEPS, _keep),
    (MODULE_POOLS, _pool),
    ((custom.Mean, custom.Sum), _mean),
    ((custom.Multiply,), _product),
    ((custom.Divide,), _quotient),
    ((custom.Add, custom.Subtract), _sum),
    ((custom.MatMul, custom.Bmm), _matmul),
)
FUNCTION_RULES: tuple[tuple[Collection[str], Rule], ...] = (
    (MOVES, _move),
    (KEEPS, _keep),
    (MEANS, _mean),
    (PRODUCTS, _product),
    (QUOTIENTS, _quotient),
    (SUMS, _sum),
    (MATMULS, _matmul),
    ((ATTENTION,), _attention),
)
