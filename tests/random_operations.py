"""The operations of random graphs: for each, how it is built into a model and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from aimet_torch.nn.modules import custom
from torch import Tensor, nn

SEQ, FLAT, LINE, MAP = "(B, T, C)", "(B, C)", "(B, C, L)", "(B, C, H, W)"
VECTOR = "(C,)"
ROWS = (SEQ, FLAT, VECTOR)
"""Layouts whose last dimension is the channels."""

MOST_CHANNELS = 12


class Type(NamedTuple):
    """What is known of a value before the model runs; batch and lengths are not."""

    layout: str
    channels: int

    @property
    def axis(self) -> int:
        """Dimension of the channels."""
        return -1 if self.layout in ROWS else 1

    def of(self, channels: int) -> Type:
        return Type(self.layout, channels)


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: a key of `OPS`.
        source, other: what it reads: how many values that fit are newer.
        size: a width, a place, a choice among functions.
        way: which of the ways to write it: a module, a function, in place, …
        when: None, or which of the graph's conditions decides whether this op runs or its twin,
            which has weights of its own and the next `size`.
        skip: the twin is nothing at all, where that keeps the shape.
    """

    name: str
    source: int = 0
    other: int = 0
    size: int = 0
    way: int = 0
    when: int | None = None
    skip: bool = False


Run = Callable[[Any, list[Tensor]], Tensor]
"""(model, tensors of the sources) → tensor. It holds names of modules, not modules: sims copy."""


class Built(NamedTuple):
    """An op made ready to run."""

    run: Run
    type: Type


class Owner(Protocol):
    """The model that operations are built into.

    Attributes:
        weighted: its linears and convolutions: name, what each reads, what each gives.
    """

    weighted: list[tuple[str, Type, Type]]

    def own(self, module: nn.Module) -> str:
        """Take a module in, return its name."""

    def own_buffer(self, tensor: Tensor) -> str:
        """Take a tensor in, return its name."""

    def get_submodule(self, name: str) -> Any: ...


Make = Callable[[Owner, Op, Type], Built]

OPS: dict[str, tuple[Make, Callable[[Type], bool]]] = {}


def op(name: str, *layouts: str, channels: int = 1) -> Callable[[Make], Make]:
    """Register an op that reads values of these layouts with so many channels or more."""

    def register(make: Make) -> Make:
        fits = lambda t: (not layouts or t.layout in layouts) and t.channels >= channels  # noqa: E731
        OPS[name] = (make, fits)
        return make

    return register


def flat(kind: Type) -> Type:
    return Type(FLAT, kind.channels)


def called(name: str, reads: int = 1) -> Run:
    return lambda m, xs: m.get_submodule(name)(*xs[:reads])


def choose(options: list[Any], number: int) -> Any:
    return options[number % len(options)]


def layer(m: Owner, kind: Type, out: int, way: int = 0, kernel: int = 1) -> str:
    """A linear or convolution that keeps lengths."""
    bias = way % 2 == 0
    if kind.layout in ROWS:
        name = m.own(nn.Linear(kind.channels, out, bias=bias))
    else:
        transposed = way % 4 == 3
        groups = kind.channels if way % 3 == 2 and out % kind.channels == 0 else 1
        name = m.own(
            {
                (LINE, False): nn.Conv1d,
                (LINE, True): nn.ConvTranspose1d,
                (MAP, False): nn.Conv2d,
                (MAP, True): nn.ConvTranspose2d,
            }[kind.layout, transposed](
                kind.channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias
            )
        )
    m.weighted.append((name, kind, kind.of(out)))
    return name


@op("weighted")
def weighted(m: Owner, op: Op, kind: Type) -> Built:
    out = choose([kind.channels, 4, 2, 6, 1, 3], op.size)
    if op.when is not None and not op.skip:
        out = kind.channels  # a twin must give what it gives
    return Built(called(layer(m, kind, out, op.way, 1 + 2 * (op.size % 2))), kind.of(out))


@op("norm")
def norm(m: Owner, op: Op, kind: Type) -> Built:
    c = kind.channels
    modules: dict[str, list[Callable[[], nn.Module]]] = {
        SEQ: [lambda: nn.LayerNorm(c), lambda: nn.RMSNorm(c, eps=1e-5)],
        FLAT: [lambda: nn.LayerNorm(c), lambda: nn.BatchNorm1d(c)],
        VECTOR: [lambda: nn.LayerNorm(c), lambda: nn.RMSNorm(c, eps=1e-5)],
        LINE: [lambda: nn.BatchNorm1d(c), lambda: nn.GroupNorm(1, c)],
        MAP: [lambda: nn.BatchNorm2d(c), lambda: nn.GroupNorm(1, c)],
    }
    return Built(called(m.own(choose(modules[kind.layout], op.way)())), kind)


@op("homogeneous")
def homogeneous(m: Owner, op: Op, kind: Type) -> Built:
    """A function f with f(αx) = αf(x) for α > 0, or one that loses nothing."""
    slopes = kind.channels if kind.layout in (FLAT, LINE, MAP) else 1  # a PReLU's are dimension 1
    modules: list[Callable[[], nn.Module]] = [
        nn.ReLU,
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.PReLU(slopes),
        lambda: nn.ReLU(inplace=True),
        nn.Dropout,
        nn.Identity,
    ]
    functions: list[Callable[[Tensor], Tensor]] = [
        F.relu,
        torch.relu_,
        torch.neg,
        torch.abs,
        lambda x: F.leaky_relu(x, 0.1),
        lambda x: x / 3.0,
        lambda x: x.to(dtype=torch.float32).to(torch.float64),
    ]
    if op.way % 2 == 0:
        return Built(called(m.own(choose(modules, op.size)())), kind)
    return Built(lambda _, xs: choose(functions, op.size + op.way)(xs[0]), kind)


@op("other function")
def other_function(m: Owner, op: Op, kind: Type) -> Built:
    modules = [nn.GELU, nn.SiLU, nn.ReLU6, nn.Sigmoid]
    functions: list[Callable[[Tensor], Tensor]] = [
        F.gelu,
        torch.tanh,
        lambda x: x.clamp(-6, 6),
        lambda x: x.clamp_(-6, 6),
        lambda x: x.to(dtype=torch.int64).to(torch.float64),
    ]
    if op.way % 2 == 0:
        return Built(called(m.own(choose(modules, op.size)())), kind)
    return Built(lambda _, xs: choose(functions, op.size)(xs[0]), kind)


def row(kind: Type) -> tuple[int, ...]:
    """Shape of one number a channel."""
    return (kind.channels, *[1] * {LINE: 1, MAP: 2}.get(kind.layout, 0))


@op("gated")
def gated(m: Owner, op: Op, kind: Type) -> Built:
    """As in a decoder's MLP: f(gate x) · up x."""
    out = choose([4, 6, 3], op.size)
    gate, up = layer(m, kind, out, op.way), layer(m, kind, out, op.way + 1)
    silu, product = m.own(nn.SiLU()), m.own(custom.Multiply())

    def run(m: Any, xs: list[Tensor]) -> Tensor:
        g, u = m.get_submodule(gate)(xs[0]), m.get_submodule(up)(xs[0])
        if op.way % 2 == 0:
            return m.get_submodule(product)(m.get_submodule(silu)(g), u)
        return F.silu(g).mul_(u)

    return Built(run, kind.of(out))


@op("product")
def product(m: Owner, op: Op, kind: Type) -> Built:
    way = op.way % 6
    if way == 0:
        return Built(called(m.own(custom.Multiply()), reads=2), kind)
    if way == 1:
        buffer = m.own_buffer(torch.randn(row(kind)))
        return Built(lambda m, xs: xs[0] * m.get_buffer(buffer), kind)
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x * y,
        lambda x, y: torch.sigmoid(y) * x,
        lambda x, y: 0.5 * x,
        lambda x, y: x.mul_(y.clone()),  # torch writes over no other view of what it reads
    ]
    return Built(lambda _, xs: functions[way - 2](xs[0], xs[1]), kind)


@op("sum")
def total(m: Owner, op: Op, kind: Type) -> Built:
    way = op.way % 7
    if way == 0:
        return Built(called(m.own(custom.Add()), reads=2), kind)
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x + y,
        lambda x, y: x - 2 * y,
        lambda x, y: x + x,
        lambda x, y: x.add_(y.clone()),
        lambda x, y: x + 1,
        lambda x, y: torch.add(x, y, alpha=2),
    ]
    return Built(lambda _, xs: functions[way - 1](xs[0], xs[1]), kind)


@op("joined")
def joined(m: Owner, op: Op, kind: Type) -> Built:
    axis, both = kind.axis, kind.of(2 * kind.channels)
    if 2 * kind.channels > MOST_CHANNELS:
        return Built(lambda _, xs: xs[0], kind)
    if op.way % 3 == 0:
        return Built(called(m.own(custom.Concat(axis)), reads=2), both)
    if op.way % 3 == 1 or axis != -1:
        return Built(lambda _, xs: torch.cat(xs, axis), both)
    return Built(lambda _, xs: torch.stack(xs, -1).flatten(-2), both)


@op("part", channels=2)
def part(m: Owner, op: Op, kind: Type) -> Built:
    axis, c = kind.axis, kind.channels
    begin = op.size % c
    if op.when is not None:  # the twin takes as many channels, other ones
        begin = op.size % 2 * (c - c // 2)
    width = c // 2 if op.when is not None else max(1, min(c - begin, 1 + op.size // 2))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.narrow(axis, begin, width),
        lambda x: x.movedim(axis, -1)[..., begin : begin + width].movedim(-1, axis),
        lambda x: torch.split(x, [begin, width, c - begin - width], axis)[1],
    ]
    return Built(lambda _, xs: choose(functions, op.way)(xs[0]), kind.of(width))


@op("order", channels=2)
def order(m: Owner, op: Op, kind: Type) -> Built:
    axis, c = kind.axis, kind.channels
    at = 1 + op.size % (c - 1)
    if op.way % 6 == 5 and kind.layout in (LINE, MAP) and c % 2 == 0:
        return Built(called(m.own(nn.ChannelShuffle(2))), kind)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.flip(axis),
        lambda x: x.roll(at, axis),
        lambda x: torch.cat((x.narrow(axis, at, c - at), x.narrow(axis, 0, at)), axis),
        lambda x: torch.cat(x.split(1, axis)[::-1], axis),
        lambda x: x.index_select(axis, torch.arange(c).roll(at)),
    ]
    return Built(lambda _, xs: choose(functions, op.way)(xs[0]), kind)


@op("repeated")
def repeated(m: Owner, op: Op, kind: Type) -> Built:
    if 2 * kind.channels > MOST_CHANNELS:
        return Built(lambda _, xs: xs[0], kind)
    axis = kind.axis
    if op.way % 2 == 0:
        return Built(lambda _, xs: xs[0].repeat_interleave(2, axis), kind.of(2 * kind.channels))
    return Built(lambda _, xs: torch.cat((xs[0], xs[0]), axis), kind.of(2 * kind.channels))


@op("moved")
def moved(m: Owner, op: Op, kind: Type) -> Built:
    axis, c = kind.axis, kind.channels
    heads = 2 if c % 2 == 0 else 1
    split = (-2, -1) if axis < 0 else (1, 2)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: x.unflatten(axis, (heads, c // heads)).flatten(*split),
        lambda x: x.detach(),
        lambda x: x.clone(),
        lambda x: x[None].squeeze(0),
        lambda x: x.reshape(*x.shape),
        lambda x: x.contiguous().view(x.shape),
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    ]
    return Built(lambda _, xs: choose(functions, op.size + 3 * op.way)(xs[0]), kind)


@op("pool", SEQ, FLAT, LINE, MAP)
def pool(m: Owner, op: Op, kind: Type) -> Built:
    if kind.layout == FLAT:
        vectors: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.mean(0),
            lambda x: x[0],
            lambda x: x.mT @ torch.ones(x.shape[0]).to(x),
            lambda x: torch.ones(x.shape[0]).to(x) @ x,
        ]
        return Built(lambda _, xs: choose(vectors, op.way)(xs[0]), Type(VECTOR, kind.channels))
    if kind.layout == SEQ:
        reductions: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.mean(1),
            lambda x: x.sum(axis=1),
            lambda x: x.mean(dim=1, keepdim=True).squeeze(1),
            lambda x: x.amax(1),
            lambda x: x[:, -1],
        ]
        return Built(lambda _, xs: choose(reductions, op.way)(xs[0]), flat(kind))
    if op.way % 4 == 3:
        dims = (2,) if kind.layout == LINE else (2, 3)
        return Built(lambda _, xs: xs[0].mean(dims), flat(kind))
    if op.way % 4 == 2 and kind.layout == MAP and 4 * kind.channels <= MOST_CHANNELS:
        return Built(
            lambda _, xs: F.adaptive_avg_pool2d(xs[0], 2).flatten(1), Type(FLAT, 4 * kind.channels)
        )
    classes = {LINE: [nn.MaxPool1d, nn.AvgPool1d], MAP: [nn.MaxPool2d, nn.AvgPool2d]}[kind.layout]
    return Built(called(m.own(choose(classes, op.way)(3, 1, 1))), kind)


@op("layout", SEQ, LINE, MAP)
def layout(m: Owner, op: Op, kind: Type) -> Built:
    if kind.layout == MAP:
        return Built(lambda _, xs: xs[0].flatten(2).mT, Type(SEQ, kind.channels))
    return Built(lambda _, xs: xs[0].mT, Type(LINE if kind.layout == SEQ else SEQ, kind.channels))


@op("attention", SEQ)
def attention(m: Owner, op: Op, kind: Type) -> Built:
    """softmax(y yᵀ) v, v a projection of x with two heads or one, or a product with a vector."""
    if op.way % 4 == 3:
        return Built(lambda _, xs: xs[0].mT @ torch.ones(xs[0].shape[1]).to(xs[0]), flat(kind))
    heads = 2 if kind.channels % 2 == 0 and op.size % 2 == 0 else 1
    shared = 2 if op.size % 3 == 1 else 1  # grouped queries: so many heads read one value
    value, softmax, matmul = (
        layer(m, kind, kind.channels, op.way),
        *map(m.own, (nn.Softmax(-1), custom.MatMul())),
    )

    def run(m: Any, xs: list[Tensor]) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        v = split(m.get_submodule(value)(xs[0])).repeat_interleave(shared, 1)
        y = split(xs[1]).repeat_interleave(shared, 1)
        if op.way % 4 == 0:
            out = m.get_submodule(matmul)(m.get_submodule(softmax)(y @ y.mT), v)
        elif op.way % 4 == 1:
            out = F.scaled_dot_product_attention(y, y, v)
        else:
            out = torch.softmax(y @ y.mT, -1) @ v
        return out.transpose(1, 2).flatten(2)

    return Built(run, kind.of(shared * kind.channels))


@op("again")
def again(m: Owner, op: Op, kind: Type) -> Built:
    """An earlier layer once more: itself, or another with its weight, or its weight alone."""
    earlier = [(name, out) for name, of, out in m.weighted if of == kind]
    if not earlier:
        return Built(lambda _, xs: xs[0], kind)
    name, out = choose(earlier, op.size)
    if op.way % 3 == 0 or kind.layout not in ROWS:
        return Built(called(name), out)
    if op.way % 3 == 1:
        tied = layer(m, kind, out.channels, op.way)
        m.get_submodule(tied).weight = m.get_submodule(name).weight
        return Built(called(tied), out)
    return Built(lambda m, xs: xs[0] @ m.get_submodule(name).weight.t(), out)


@op("experts", SEQ, FLAT)
def experts(m: Owner, op: Op, kind: Type) -> Built:
    """Each row goes to one of two experts, which may get none."""
    c = kind.channels
    names = [m.own(nn.Sequential(nn.Linear(c, 3), nn.ReLU(), nn.Linear(3, c))) for _ in range(2)]

    def run(m: Any, xs: list[Tensor]) -> Tensor:
        rows = xs[0].flatten(0, -2)
        chosen = xs[1].flatten(0, -2)[:, 0] > 0
        out = torch.zeros_like(rows)
        for name, places in zip(names, (chosen, ~chosen), strict=True):
            places = places.nonzero()[:, 0]
            if op.way % 2 == 0 or places.numel():
                out = out.index_add(0, places, m.get_submodule(name)(rows[places]))
        return out.reshape(xs[0].shape)

    return Built(run, kind)


@op("rest", SEQ)
def rest(m: Owner, op: Op, kind: Type) -> Built:
    """What lies behind some place, if anything does."""
    begin = op.size % 5
    name = layer(m, kind, 2, op.way)

    def run(m: Any, xs: list[Tensor]) -> Tensor:
        return m.get_submodule(name)(xs[0][:, begin:]).sum(1)

    return Built(run, Type(FLAT, 2))


@op("read")
def read(m: Owner, op: Op, kind: Type) -> Built:
    """Python decides by a tensor's values."""
    axis = kind.axis
    questions: list[Callable[[Tensor, Tensor], bool]] = [
        lambda x, y: x.narrow(axis, 0, 1).sum().item() > 3,
        lambda x, y: bool(x.narrow(axis, 0, 1).mean() > 0.5),
        lambda x, y: torch.allclose(x.narrow(axis, 0, 1), y.narrow(axis, 0, 1), atol=2.0),
    ]
    return Built(lambda _, xs: xs[1] * (2.0 if choose(questions, op.way)(*xs) else 3.0), kind)
