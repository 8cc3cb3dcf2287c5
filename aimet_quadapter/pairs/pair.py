"""What a pair is, and the one place where α multiplies and divides.

    ŷ = W2 A⁻¹ · f(A W1 x + A b1) + b2,  A = diag(α), α > 0

equals y for every f with f(A z) = A f(z). A pair names the tensors: rows of W1 and b1 are
multiplied, columns of W2 are divided.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.norms import norm_of

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

KINDS = {
    "norm-linear": "LayerNorm or RMSNorm of any class → linears (in GPT-2: ln_1 → c_attn)",
    "norm-head": "the final norm → lm_head",
    "norm-conv": "BatchNorm → convolutions or linears",
    "linear-linear": "linear → linear with nothing but data movement between",
    "conv-conv": "convolution → convolution or linear with nothing but data movement between",
    "linear-relu-linear": "linear → ReLU, LeakyReLU or PReLU → linear",
    "conv-relu-conv": "convolution → ReLU, LeakyReLU or PReLU → convolution or linear",
    "up-down": "linear → product with a gate → linear",
    "v-o": "value projection → attention → output projection",
}
"""Kinds of pairs that `find_pairs` tells apart."""


def channel_dim(module: nn.Module | None, ndim: int) -> int:
    """Dimension of a module's input or output that holds the channels.

    The last of (B, T, C) or (T, B, C) for a linear or a norm of vectors; the one before the L,
    H × W or D × H × W of a convolution; the second of a BatchNorm.
    """
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return ndim - 1 - len(module.kernel_size)
    return 1 if isinstance(module, BATCH_NORMS) else ndim - 1


@dataclass(frozen=True, eq=False)
class Scale:
    """How α enters one tensor: (tensor + offset) · α[index] − offset, or tensor / α[index].

    Attributes:
        module: name of the module that owns the tensor.
        parameter: its name there.
        index: long tensor that broadcasts against the parameter: the channel of α at each
            place, −1 where the tensor stays as it is. A grouped-query repeat is simply an
            index that names a channel several times.
        divide: True on the consumer's side.
        offset: what the module adds to the tensor: 1 for a norm whose weights lie around 0.
    """

    module: str
    parameter: str
    index: Tensor
    divide: bool
    offset: float = 0.0

    def apply(self, tensor: Tensor, alpha: Tensor, out: Tensor | None = None) -> Tensor:
        """The scaled tensor, differentiable in α.

        Args:
            tensor: a parameter.
            alpha: α, shape (channels,).
            out: where to write it, the tensor itself for one; without gradients then.
        """
        index = self.index.to(alpha.device)
        factor = torch.where(index >= 0, alpha[index.clamp(min=0)], alpha.new_ones(()))
        factor = factor.to(device=tensor.device, dtype=tensor.dtype)
        if self.offset:
            scaled = (tensor + self.offset) * factor - self.offset
            return scaled if out is None else out.copy_(scaled)
        return (torch.div if self.divide else torch.mul)(tensor, factor, out=out)


def producer_scales(name: str, module: nn.Module, index: Tensor) -> Iterator[Scale]:
    """How α multiplies a producer's weight and bias.

    Args:
        name: the module's name in the model.
        module: a norm, linear or convolution.
        index: the channel of α of each output channel, −1 where it is not scaled.
    """
    weight = module.get_parameter("weight")
    kernel = [1] * (weight.dim() - 2)
    if isinstance(module, TRANSPOSED):  # (in, out / groups, …): a row serves its group's outputs
        rows = index.reshape(module.groups, 1, -1)  # (G, 1, O/G)
        rows = rows.expand(-1, module.in_channels // module.groups, -1).flatten(0, 1)
        places = rows.reshape(*rows.shape, *kernel)
    else:  # (out, …)
        places = index.reshape(-1, *[1] * (weight.dim() - 1))
    norm = norm_of(module)
    yield Scale(name, "weight", places, divide=False, offset=norm.offset if norm else 0.0)
    if getattr(module, "bias", None) is not None:
        yield Scale(name, "bias", index, divide=False)


def consumer_scale(name: str, module: nn.Module, columns: Tensor) -> Scale:
    """How α divides a consumer's weight.

    Args:
        name: the module's name in the model.
        module: a linear or convolution.
        columns: the channel of α of each input channel, −1 where it is not scaled.
    """
    if isinstance(module, nn.Linear):  # (out, in)
        index = columns[None, :]
    elif isinstance(module, TRANSPOSED):  # (in, out / groups, …)
        index = columns.reshape(-1, 1, *[1] * len(module.kernel_size))
    else:  # (out, in / groups, …)
        assert isinstance(module, CONVS)
        rows = columns.reshape(module.groups, 1, -1)  # (G, 1, I/G)
        rows = rows.expand(-1, module.out_channels // module.groups, -1).flatten(0, 1)
        index = rows.reshape(*rows.shape, *[1] * len(module.kernel_size))
    return Scale(name, "weight", index, divide=True)


@dataclass(frozen=True, eq=False)
class Pair:
    """A producer and the consumers that share one α.

    Attributes:
        kind: a key of `KINDS`.
        producer: name of the module whose output channels are multiplied.
        consumers: names of the modules whose input channels are divided.
        channels: number d of scales.
        scales: every tensor that α touches.
        columns: for each consumer, the channel of α at each input channel (−1: none).
        between: names of the modules between producer and consumers.
        ways: the block's operations on each way through the model that runs it, producer first,
            as (distance from the producer in the order of execution, name).
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    channels: int
    scales: tuple[Scale, ...]
    columns: tuple[Tensor, ...]
    between: tuple[str, ...]
    ways: tuple[tuple[tuple[int, str], ...], ...]

    @property
    def name(self) -> str:
        return f"{self.producer} -> {', '.join(self.consumers)}"

    def __str__(self) -> str:
        through = f" through {', '.join(self.between)}" if self.between else ""
        return f"{self.kind}: {self.name}{through}, {self.channels} channels"


@dataclass(frozen=True)
class Refusal:
    """A candidate that is no pair, and why."""

    producer: str
    reason: str

    def __str__(self) -> str:
        return f"refused: {self.producer}: {self.reason}"


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """The pairs of a sim, in order of execution.

    Attributes:
        found: the pairs.
        refused: the candidates that are none.
        not_run: modules that hold weights and that no sample ran.
    """

    found: tuple[Pair, ...]
    refused: tuple[Refusal, ...] = field(default=())
    not_run: tuple[str, ...] = field(default=())

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return self.found[i]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.found)

    def select(self, kinds: Iterable[str] | None = None, names: str | None = None) -> Pairs:
        """The pairs of some kinds whose producer or a consumer matches a name pattern.

        Args:
            kinds: keys of `KINDS`, or a single one; None for all.
            names: shell pattern such as `"*.layers.3.*"`; None for all.

        Raises:
            ValueError: a kind is not known.
        """
        kinds = (kinds,) if isinstance(kinds, str) else None if kinds is None else tuple(kinds)
        unknown = [k for k in kinds or () if k not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind of pair {unknown[0]!r}; known: {', '.join(KINDS)}.")

        def wanted(pair: Pair) -> bool:
            modules = (pair.producer, *pair.consumers)
            return (kinds is None or pair.kind in kinds) and (
                names is None or any(fnmatch.fnmatchcase(m, names) for m in modules)
            )

        return Pairs(tuple(p for p in self.found if wanted(p)), self.refused, self.not_run)

    def without(self, inexact: Mapping[str, float]) -> Pairs:
        """The pairs less some that failed their proof, which are listed as refused.

        Args:
            inexact: name of a pair → share by which it changes the model's output.
        """
        refused = tuple(
            Refusal(
                p.producer,
                f"random scales change the model's output by {inexact[p.name]:.2g} of its "
                f"largest value: {p.name} is not exact",
            )
            for p in self.found
            if p.name in inexact
        )
        kept = tuple(p for p in self.found if p.name not in inexact)
        return Pairs(kept, (*self.refused, *refused), self.not_run)

    def counts(self) -> dict[str, int]:
        """Number of pairs of each kind."""
        kinds = [p.kind for p in self.found]
        return {k: kinds.count(k) for k in KINDS if k in kinds}

    def __str__(self) -> str:
        lines = [str(p) for p in (*self.found, *self.refused)]
        return "\n".join([*lines, *(f"not run by any sample: {name}" for name in self.not_run)])


def scales_by_module(
    pairs: Iterable[Pair], alphas: Mapping[str, Tensor]
) -> dict[str, list[tuple[Scale, Tensor]]]:
    """Module name → every (scale, α) that enters it. α is looked up by the pair's name."""
    result: dict[str, list[tuple[Scale, Tensor]]] = {}
    for pair in pairs:
        for scale in pair.scales:
            result.setdefault(scale.module, []).append((scale, alphas[pair.name]))
    return result
