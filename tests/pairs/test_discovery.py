from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.nn.modules import custom
from aimet_torch.utils import remove_all_quantizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import decoder_sim, gpt2, llama, make_sim, scaled, tokens
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import PairError, SimError, find_pairs
from aimet_quadapter.pairs.pair import Pair, Pairs, Scale
from aimet_quadapter.pairs.proof import PROOF_TOLERANCE, inexact
from aimet_quadapter.sim.inputs import call
from aimet_quadapter.sim.outputs import tensors_in
from aimet_quadapter.sim.trace import record


class Net(nn.Module):
    """Some layers and the function that joins them."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def unquantized(model: nn.Module) -> Any:
    """What `find_pairs` needs of a sim, without the seconds it takes to make one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return SimpleNamespace(model=model.eval(), connected_graph=None)


def find(model: nn.Module, *inputs: Any, **settings: Any) -> Pairs:
    """The pairs of any model; every one of them is checked by more than `prove` does."""
    sim = unquantized(model)
    pairs = find_pairs(sim, inputs, **settings)
    check_exact(model, pairs, inputs)
    return pairs


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return [t for t in tensors_in(call(model, inputs)) if t.is_floating_point()]


@torch.no_grad()
def check_exact(model: nn.Module, pairs: Pairs, inputs: Any) -> None:
    """Each pair alone under random α, and all of them folded: the output stays."""
    generator = torch.Generator().manual_seed(1)
    before = outputs(model, inputs)
    alphas = {
        p.name: torch.exp((torch.rand(p.channels, generator=generator) * 2 - 1) * math.log(10))
        for p in pairs
    }
    for group in [*[(p,) for p in pairs], tuple(pairs)]:
        with scaled(model, group, alphas):
            after = outputs(model, inputs)
        for a, b in zip(after, before, strict=True):
            assert_close(a, b, rtol=0, atol=PROOF_TOLERANCE * float(b.abs().max()))
    for a, b in zip(outputs(model, inputs), before, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def names(pairs: Pairs) -> list[str]:
    return [f"{p.kind}: {p.name}" for p in pairs]


def reason(pairs: Pairs, producer: str) -> str:
    return {r.producer: r.reason for r in pairs.refused}[producer]


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def rows(channels: int = 4) -> Tensor:
    return torch.randn(5, channels, generator=torch.Generator().manual_seed(3))


def linear_pair(middle: Callable[[Tensor], Tensor] | nn.Module) -> Net:
    layers = {"mid": middle} if isinstance(middle, nn.Module) else {}
    step = (lambda m, x: m.mid(x)) if isinstance(middle, nn.Module) else (lambda _, x: middle(x))
    return Net(lambda m, x: m.b(step(m, m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3), **layers)


def two(run: Callable[..., Any]) -> Net:
    return Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4))


def conv_pair(middle: nn.Module, **settings: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), middle, nn.Conv2d(6, 4, 3, **settings))


LINEAR_LINEAR = ["linear-linear: a -> b"]

PASSES: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "linear-linear": (linear_pair(nn.Identity()), rows(), ["linear-linear: a -> b"]),
    "linear-leaky-linear": (
        linear_pair(nn.LeakyReLU(0.3)),
        rows(),
        ["linear-relu-linear: a -> b"],
    ),
    "linear-prelu-linear": (linear_pair(nn.PReLU()), rows(), ["linear-relu-linear: a -> b"]),
    "linear-prelu-per-channel": (linear_pair(nn.PReLU(6)), rows(), ["linear-relu-linear: a -> b"]),
    "functional relu": (linear_pair(F.relu), rows(), ["linear-relu-linear: a -> b"]),
    "in-place relu": (linear_pair(lambda x: x.relu_()), rows(), ["linear-relu-linear: a -> b"]),
    "negated": (linear_pair(lambda x: -x), rows(), ["linear-linear: a -> b"]),
    "divided": (linear_pair(lambda x: x / 3.0), rows(), ["linear-linear: a -> b"]),
    "doubled": (linear_pair(lambda x: x + x), rows(), ["linear-linear: a -> b"]),
    "attribute": (
        linear_pair(lambda x: x.mT.contiguous().mT),
        rows(),
        ["linear-linear: a -> b"],
    ),
    "memory layout": (
        linear_pair(lambda x: (x.reshape(5, 2, 3).transpose(0, 1) * 2).transpose(0, 1).view(5, 6)),
        rows(),
        ["up-down: a -> b"],
    ),
    "matrix times vector": (linear_pair(lambda x: x.mT @ torch.ones(5)), rows(), ["v-o: a -> b"]),
    "vector times matrix": (linear_pair(lambda x: torch.ones(5) @ x), rows(), ["v-o: a -> b"]),
    "one row": (linear_pair(lambda x: x[0]), rows(), LINEAR_LINEAR),
    "sum over an axis": (linear_pair(lambda x: x.sum(axis=0)), rows(), LINEAR_LINEAR),
    "cat of parts": (
        linear_pair(lambda x: torch.cat((x[:, 3:], x[:, :3]), dim=1)),
        rows(),
        ["linear-linear: a -> b"],
    ),
    "batchnorm1d-linear": (
        Net(lambda m, x: m.b(m.a(x)), a=nn.BatchNorm1d(4), b=nn.Linear(4, 3)),
        rows(),
        ["norm-conv: a -> b"],
    ),
    "conv-relu-conv": (conv_pair(nn.ReLU()), image(), ["conv-relu-conv: 0 -> 2"]),
    "conv-in-place-relu": (conv_pair(nn.ReLU(True)), image(), ["conv-relu-conv: 0 -> 2"]),
    "conv-grouped": (conv_pair(nn.ReLU(), groups=2), image(), ["conv-relu-conv: 0 -> 2"]),
    "conv-maxpool": (conv_pair(nn.MaxPool2d(2)), image(), ["conv-conv: 0 -> 2"]),
    "conv-avgpool": (conv_pair(nn.AvgPool2d(3, 2, 1)), image(), ["conv-conv: 0 -> 2"]),
    "conv-dropout": (conv_pair(nn.Dropout2d(0.5)), image(), ["conv-conv: 0 -> 2"]),
    "conv-pixelshuffle": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3)),
        image(),
        [],
    ),
    "conv-depthwise-conv": (
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
        ),
        image(),
        ["conv-relu-conv: 0 -> 2", "conv-conv: 2 -> 3"],
    ),
    "conv-transposed-conv": (
        nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
        ),
        image(),
        ["conv-conv: 0 -> 1", "conv-relu-conv: 1 -> 3"],
    ),
    "conv-flatten-linear": (
        Net(
            lambda m, x: m.b(F.adaptive_avg_pool2d(F.relu(m.a(x)), 2).flatten(1)),
            a=nn.Conv2d(3, 6, 3),
            b=nn.Linear(24, 3),
        ),
        image(),
        ["conv-relu-conv: a -> b"],
    ),
    "conv-mean-linear": (
        Net(lambda m, x: m.b(m.a(x).mean((2, 3))), a=nn.Conv2d(3, 6, 3), b=nn.Linear(6, 3)),
        image(),
        ["conv-conv: a -> b"],
    ),
    "one batch dimension less": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(6, 4, 3),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(4, 2, 1),
        ),
        image()[0],
        ["conv-conv: 0 -> 2", "conv-conv: 2 -> 4"],
    ),
    "two branches joined by cat": (
        Net(
            lambda m, x: m.c(torch.cat((m.b(m.a(x)), m.d(m.a2(x))), dim=1)),
            a=nn.Linear(4, 6),
            a2=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
            d=nn.Linear(6, 3),
            c=nn.Linear(6, 2),
        ),
        rows(),
        ["linear-linear: a -> b", "linear-linear: a2 -> d"],
    ),
    "several consumers": (
        Net(
            lambda m, x: (lambda y: m.b(y) + m.c(F.relu(y)))(m.a(x)),
            a=nn.LayerNorm(4),
            b=nn.Linear(4, 3),
            c=nn.Linear(4, 3),
        ),
        rows(),
        ["norm-linear: a -> b, c"],
    ),
    "gate": (
        Net(
            lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)),
            g=nn.Linear(4, 6),
            u=nn.Linear(4, 6),
            d=nn.Linear(6, 3),
        ),
        rows(),
        ["up-down: u -> d"],
    ),
    "attention": (
        Net(
            lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
            q=nn.Linear(4, 6),
            k=nn.Linear(4, 6),
            v=nn.Linear(4, 6),
            o=nn.Linear(6, 3),
        ),
        rows()[None],
        ["v-o: v -> o"],
    ),
    "squeeze and excite": (
        Net(
            lambda m, x: (lambda y: m.c(y * torch.sigmoid(m.s(y.mean((2, 3), keepdim=True)))))(
                m.a(x)
            ),
            a=nn.Conv2d(3, 6, 3),
            s=nn.Conv2d(6, 6, 1),
            c=nn.Conv2d(6, 2, 3),
        ),
        image(),
        ["up-down: a -> s, c"],
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_commutes_is_found(name: str) -> None:
    model, x, expected = PASSES[name]
    assert names(find(model, x)) == expected


def test_pixel_shuffle_alone_keeps_channels_apart() -> None:
    """Of 8 channels 4 go into each of the 2 of the next convolution: they mix."""
    pairs = find(*PASSES["conv-pixelshuffle"][:2])
    assert "mixes" in reason(pairs, "0")


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y)) + y


def residual_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y += x
    return m.b(y)


def compared(m: Any, x: Tensor) -> Tensor:
    """What the threshold is far from does not show in a proof."""
    y = m.a(x)
    return m.b(y) * (2.0 if torch.allclose(y, torch.zeros(()), atol=1000.0) else 3.0)


def set_item(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2] = x[:, :2]
    return m.b(y)


def set_item_elsewhere(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 8)
    y[:, :4] = m.a(x)
    return m.b(y[:, :4])


def data_dependent(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y) * (2.0 if y.abs().sum().item() > 3 else 3.0)


REFUSED: dict[str, tuple[nn.Module, Any, str]] = {
    "gelu": (linear_pair(nn.GELU()), rows(), "GELU"),
    "relu6": (linear_pair(nn.ReLU6()), rows(), "ReLU6"),
    "hardswish": (linear_pair(nn.Hardswish()), rows(), "Hardswish"),
    "functional gelu": (linear_pair(F.gelu), rows(), r"gelu\(\)"),
    "squared": (linear_pair(lambda x: x * x), rows(), "itself"),
    "divided by": (linear_pair(lambda x: 1 / (x + 9)), rows(), "residual|divide|commute"),
    "constant added": (linear_pair(lambda x: x + 1), rows(), "adds it"),
    "softmax": (linear_pair(nn.Softmax(-1)), rows(), "Softmax"),
    "to integers": (linear_pair(lambda x: x.to(torch.int32).to(x.dtype)), rows(), "integers"),
    "to integers by name": (
        linear_pair(lambda x: x.to(dtype=torch.int32).to(dtype=x.dtype)),
        rows(),
        "integers",
    ),
    "summed as integers": (
        linear_pair(lambda x: x.sum(0, dtype=torch.int32).to(x.dtype)),
        rows(),
        "integers",
    ),
    "bits as another type": (
        linear_pair(lambda x: x.view(torch.int16).view(x.dtype)),
        rows(),
        "another type",
    ),
    "norm": (linear_pair(nn.LayerNorm(6)), rows(), "normalizes"),
    "flip added": (linear_pair(lambda x: x + x.flip(1)), rows(), "different channels"),
    "summed": (
        Net(lambda m, x: m.b(m.a(x).sum(1, keepdim=True)), a=nn.Linear(4, 6), b=nn.Linear(1, 3)),
        rows(),
        "several of its channels",
    ),
    "pooled over channels": (
        Net(lambda m, x: m.b(F.max_pool1d(m.a(x)[None], 2)), a=nn.Linear(4, 6), b=nn.Linear(3, 3)),
        rows(),
        "pools over",
    ),
    "residual": (two(residual), rows(), "residual"),
    "in-place residual": (
        two(residual_in_place),
        rows(),
        "residual",
    ),
    "set item": (two(set_item), rows(), "__setitem__"),
    "set item elsewhere": (
        two(set_item_elsewhere),
        rows(),
        "__setitem__",
    ),
    "read by python": (
        two(data_dependent),
        rows(),
        "abs|item|sum",
    ),
    "compared by python": (two(compared), rows(), r"allclose\(\)"),
    "joined with unscaled": (
        Net(lambda m, x: m.b(torch.cat((m.a(x), x), 1)), a=nn.Linear(4, 4), b=nn.Linear(8, 4)),
        rows(),
        "not scaled",
    ),
    "called twice": (two(lambda m, x: m.b(m.a(m.a(x)))), rows(), "more than once"),
    "also an output": (
        two(lambda m, x: (lambda y: (y, m.b(y)))(m.a(x))),
        rows(),
        "output",
    ),
    "also an output in a dict": (
        two(lambda m, x: (lambda y: {"hidden": [y], "out": m.b(y)})(m.a(x))),
        rows(),
        "output",
    ),
    "nothing reads it": (two(lambda m, x: (m.a(x), m.b(x))[1]), rows(), "no linear"),
    "no weight": (
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)),
        rows(),
        "no weight",
    ),
    "norm over two dimensions": (
        Net(lambda m, x: m.b(m.a(x)), a=nn.LayerNorm((5, 4)), b=nn.Linear(4, 4)),
        rows(),
        "2 dimensions",
    ),
    "weight read elsewhere": (
        two(lambda m, x: m.b(m.a(x)) + F.linear(x, m.a.weight)),
        rows(),
        r"also read by linear\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_is_refused_with_its_reason(name: str) -> None:
    model, x, pattern = REFUSED[name]
    pairs = find(model, x)
    assert not [p for p in pairs if p.producer in ("a", "0")]
    found = next(r for r in pairs.refused if r.producer in ("a", "0"))
    assert re.search(pattern, found.reason), found.reason


def test_a_parametrized_layer_is_no_candidate() -> None:
    a = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert len(find(Net(lambda m, x: m.b(m.a(x)), a=a, b=nn.Linear(4, 4)), rows())) == 0


def test_tied_weights_are_refused() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    pairs = find(Net(lambda m, x: m.c(m.b(m.a(x))), a=a, b=b, c=nn.Linear(4, 2)), rows())
    assert len(pairs) == 0
    assert "tied to b" in reason(pairs, "a")


def test_a_tied_consumer_is_refused() -> None:
    b, c = nn.Linear(4, 4), nn.Linear(4, 4)
    c.weight = b.weight
    pairs = find(Net(lambda m, x: m.b(m.a(x)) + m.c(x), a=nn.Linear(4, 4), b=b, c=c), rows())
    assert "tied to c" in reason(pairs, "a")


def test_channels_that_are_blocked_leave_the_others() -> None:
    """Half of the producer's channels goes through a GELU, as q and k of a fused projection do."""

    def run(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, dim=-1)
        return m.b(F.gelu(left)) + m.c(right)

    (found,) = find(Net(run, a=nn.Linear(4, 6), b=nn.Linear(3, 2), c=nn.Linear(3, 2)), rows())
    assert (found.consumers, found.channels) == (("c",), 3)
    assert found.scales[1].index.tolist() == [-1, -1, -1, 0, 1, 2]


@dataclasses.dataclass
class Output:
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize("wrap", [dict, Output])
def test_keyword_inputs_and_structured_outputs(wrap: Any) -> None:
    model = Net(
        lambda m, x, y: (lambda h: wrap(hidden=h, logits=m.c(m.b(h) + y)))(m.a(x)),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 6),
        c=nn.Linear(6, 2),
    )
    pairs = find_pairs(unquantized(model), {"y": torch.randn(5, 6), "x": rows()})
    assert len(pairs) == 0
    assert "output" in reason(pairs, "a")


def test_keyword_arguments_of_layers() -> None:
    model = Net(lambda m, x: m.b(input=m.a(input=x)), a=nn.Linear(4, 4), b=nn.Linear(4, 6))
    assert names(find(model, rows())) == ["linear-linear: a -> b"]


def test_modules_that_move_data_in_a_sim() -> None:
    model = Net(
        lambda m, x: m.b(
            (lambda y: m.cat(y[:, 1:], y[:, :1]))(
                m.perm(m.r(m.a(x), (5, 3, 2)), (0, 2, 1))
            ).flatten(1)
        ),
        a=nn.Linear(4, 6),
        r=custom.Reshape(),
        perm=custom.Permute(),
        cat=custom.Concat(1),
        b=nn.Linear(6, 3),
    )
    sim = make_sim(model, rows())
    sim.compute_encodings(lambda m: m(rows()))
    assert names(find_pairs(sim)) == ["linear-linear: a -> b"]


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def mobilenet_v2() -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35)


def mobilenet_v3() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=5)


@pytest.mark.parametrize(
    ("make", "folded", "expected"),
    [
        (resnet, False, {"norm-conv": 8}),
        (resnet, True, {"conv-relu-conv": 8}),
        (mobilenet_v2, False, {"norm-conv": 2}),
        (mobilenet_v2, True, {"conv-conv": 2}),
        (mobilenet_v3, False, None),
        (mobilenet_v3, True, None),
    ],
)
def test_image_models(make: Any, folded: bool, expected: dict[str, int] | None) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 3, 32, 32)
    if folded:
        fold_all_batch_norms(model, None, x)
    sim = make_sim(model, x)
    pairs = find_pairs(sim)  # its inputs are floats: no dummy input needed
    if expected is None:
        assert len(pairs) > 5
    else:
        assert pairs.counts() == expected
    with remove_all_quantizers(sim.model):
        check_exact(sim.model, pairs, (x,))


def test_a_depthwise_convolution_is_a_consumer_and_a_producer() -> None:
    torch.manual_seed(0)
    model, x = mobilenet_v3().eval(), torch.randn(1, 3, 32, 32)
    fold_all_batch_norms(model, None, x)
    pairs = find(model, x)
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert depthwise & {c for p in pairs for c in p.consumers}
    assert depthwise & {p.producer for p in pairs}


LAYERS = st.sampled_from(
    [
        "linear",
        "linear",
        "layernorm",
        "batchnorm",
        "relu",
        "leaky",
        "gelu",
        "dropout",
        "double",
        "residual",
        "permute",
        "split",
        "gate",
        "relu6",
        "side",
    ]
)


class Random(nn.Module):
    """A random sequence of layers on (B, C)."""

    def __init__(self, names: list[str], widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.names = names
        self.sides = nn.ModuleDict()
        width = 4
        for i, name in enumerate(names):
            new = widths[i % len(widths)]
            layer: nn.Module = nn.Identity()
            if name == "linear":
                layer, width = nn.Linear(width, new, bias=bool(new % 2)), new
            elif name == "layernorm":
                layer = nn.LayerNorm(width)
            elif name == "batchnorm":
                layer = nn.BatchNorm1d(width)
            elif name in ("gate", "side"):
                self.sides[str(i)] = nn.Linear(4 if name == "gate" else width, width)
            else:
                fixed = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "gelu": nn.GELU()}
                layer = (fixed | {"dropout": nn.Dropout(), "relu6": nn.ReLU6()}).get(name, layer)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        first = kept = x
        total = x.new_zeros(())
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            x = layer(x)
            if name == "double":
                x = x + x
            elif name == "residual":
                x = x + kept if kept.shape == x.shape else x
                kept = x
            elif name == "permute":
                x = x.flip(1)
            elif name == "split":
                left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
                x = torch.cat((right, left), dim=1)
            elif name == "gate":
                x = x * torch.sigmoid(self.sides[str(i)](first))
            elif name == "side":
                total = total + self.sides[str(i)](x).sum()
        return x + total


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(LAYERS, min_size=2, max_size=10), st.lists(st.integers(2, 7), min_size=1))
def test_random_sequences_of_layers(layers: list[str], widths: list[int]) -> None:
    torch.manual_seed(len(layers))
    pairs = find(Random(layers, widths), rows())
    assert len(pairs) + len(pairs.refused) >= layers.count("linear")


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    groups=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4),
    middle=st.lists(st.sampled_from(["relu", "max", "avg", "leaky", "bn", "none"]), min_size=3),
    transposed=st.lists(st.booleans(), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_random_convolutions(
    groups: list[int], middle: list[str], transposed: list[bool], bias: bool
) -> None:
    torch.manual_seed(0)
    between: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "leaky": nn.LeakyReLU,
        "max": lambda: nn.MaxPool2d(2, 1),
        "avg": lambda: nn.AvgPool2d(2, 1),
        "bn": lambda: nn.BatchNorm2d(8),
        "none": nn.Identity,
    }
    layers: list[nn.Module] = []
    for i, g in enumerate(groups):
        cls = nn.ConvTranspose2d if transposed[i] else nn.Conv2d
        layers += [cls(8, 8, 2, groups=g, bias=bias), between[middle[i % len(middle)]]()]
    pairs = find(nn.Sequential(*layers), image(8, 8))
    expected = sum(m != "bn" for m in (middle[i % len(middle)] for i in range(len(groups) - 1)))
    assert len([p for p in pairs if not p.kind.startswith("norm")]) == expected


def wrong(pair: Pair, **changes: Any) -> Pair:
    return dataclasses.replace(pair, **changes)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_wrong_pair_is_named(make: Any) -> None:
    sim = decoder_sim(make(1))
    pairs = find_pairs(sim)
    inputs = sim.model.dummy_input()
    assert inexact(sim, pairs, [inputs]) == {}
    for pair in pairs:
        half = wrong(pair, scales=pair.scales[:1])
        roll = wrong(
            pair,
            scales=(
                *pair.scales[:-1],
                dataclasses.replace(pair.scales[-1], index=pair.scales[-1].index.roll(1, -1)),
            ),
        )
        for bad in (half, roll):
            failed = inexact(sim, [*(p for p in pairs if p is not pair), bad], [inputs])
            assert list(failed) == [pair.name]
            assert failed[pair.name] > PROOF_TOLERANCE


def test_broken_weights_are_named() -> None:
    model = linear_pair(nn.ReLU())
    sim = unquantized(model)
    with torch.no_grad():
        model.b.weight[0, 0] = float("nan")
    with pytest.raises(PairError, match="NaN"):
        find_pairs(sim, rows())


def test_a_model_that_is_random_is_named() -> None:
    model = linear_pair(lambda x: F.dropout(x, training=True))
    with pytest.raises(PairError, match="another output each time"):
        find_pairs(unquantized(model), rows())


def test_a_model_without_float_outputs_proves_nothing() -> None:
    model = Net(lambda m, x: m.b(m.a(x)).argmax(-1), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(PairError, match="no float tensor"):
        find_pairs(unquantized(model), rows())


def test_what_is_no_sim_is_refused() -> None:
    with pytest.raises(SimError, match="Linear"):
        find_pairs(nn.Linear(2, 2))


def test_a_model_of_token_ids_needs_its_dummy_input() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    ids = torch.tensor([[1, 2, 3]])
    sim = make_sim(model, ids)
    with pytest.raises(SimError, match="dummy input"):
        find_pairs(sim)
    for given_input in (ids, (ids,), [ids]):
        assert names(find_pairs(sim, given_input)) == ["norm-head: 1 -> 2"]


def test_the_inputs_of_a_float_model_are_read_from_its_sim() -> None:
    model = Net(
        lambda m, x, y: m.b(F.relu(m.a(x))) + m.c(y),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        c=nn.Linear(2, 3),
    )
    sim = make_sim(model, rows(), torch.randn(5, 2))
    assert names(find_pairs(sim)) == ["linear-relu-linear: a -> b"]
    half = make_sim(model.bfloat16(), rows().bfloat16(), torch.randn(5, 2).bfloat16())
    assert names(find_pairs(half)) == ["linear-relu-linear: a -> b"]


def test_a_sim_that_begins_with_a_function_is_given_inputs_of_its_weights_type() -> None:
    """The first parameter of such a sim is that of a quantizer, in float32."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 3)).bfloat16()
    assert names(find_pairs(make_sim(model, rows().bfloat16()))) == ["linear-linear: 1 -> 2"]


def test_a_sim_without_weights_has_no_pairs() -> None:
    assert len(find_pairs(make_sim(nn.Sequential(nn.ReLU(), nn.Sigmoid()), rows()))) == 0


def test_an_input_that_several_operations_read() -> None:
    model = Net(
        lambda m, x, y: m.b(m.a(x)) + m.c(x) + x.sum() + m.d(y),
        a=nn.LayerNorm(4),
        b=nn.Linear(4, 3),
        c=nn.Linear(4, 3),
        d=nn.Linear(2, 3),
    )
    assert names(find_pairs(make_sim(model, rows(), torch.randn(5, 2)))) == ["norm-linear: a -> b"]


def snapshot(sim: Any) -> dict[str, Any]:
    """Everything of a sim that a search for pairs could change."""
    modules = dict(sim.model.named_modules())
    return {
        "state": {
            k: v.clone() for k, v in (*sim.model.named_parameters(), *sim.model.named_buffers())
        },
        "pointers": {k: v.data_ptr() for k, v in sim.model.named_parameters()},
        "modules": {n: id(m) for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()
        },
        "attributes": {n: set(vars(m)) for n, m in modules.items()},
        "initialized": {n: m.is_initialized() for n, m in modules.items() if hasattr(m, "qmin")},
        "grad": {n: p.requires_grad for n, p in sim.model.named_parameters()},
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_close(after.pop("state"), before.pop("state"), atol=0, rtol=0, equal_nan=True)
    assert_close(after.pop("rng"), before.pop("rng"), atol=0, rtol=0)
    assert after == before


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sim_is_left_as_it_was(calibrated: bool, dtype: torch.dtype) -> None:
    sim = decoder_sim(llama(1).to(dtype), calibrated=calibrated)
    sim.model.train()
    before = snapshot(sim)
    pairs = find_pairs(sim)
    assert len(pairs) == 5
    assert_same(before, snapshot(sim))
    if calibrated:
        assert sim.model.eval()(tokens()).isfinite().all()


def test_the_sim_is_left_as_it_was_after_a_failure() -> None:
    sim = decoder_sim(llama(1).bfloat16(), calibrated=True)
    before = snapshot(sim)
    with pytest.raises(RuntimeError, match="size"):
        find_pairs(sim, {"input_ids": tokens(1, 8), "attention_mask": torch.ones(1, 5)})
    assert_same(before, snapshot(sim))


def test_a_pair_that_is_not_exact_is_listed_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = decoder_sim(llama(2))
    before = snapshot(sim)
    exact = Scale.apply

    def broken(scale: Scale, tensor: Tensor, alpha: Tensor, out: Tensor | None) -> Tensor:
        wrong = scale.module.endswith("layers.1.mlp.up_proj")
        return exact(scale, tensor, alpha, out) * (1.5 if wrong else 1)

    expected = [p for p in find_pairs(sim) if "layers.1.mlp.up_proj" not in p.name]
    monkeypatch.setattr(Scale, "apply", broken)
    pairs = find_pairs(sim)
    assert [p.name for p in pairs] == [p.name for p in expected]
    assert any("layers.1.mlp.up_proj" in str(r) and "not exact" in str(r) for r in pairs.refused)
    assert_same(before, snapshot(sim))


def test_a_later_output_that_is_nan_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(
        lambda m, x: (m.c(x), m.b(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(4, 3)
    )
    exact = Scale.apply

    def broken(scale: Scale, tensor: Tensor, alpha: Tensor, out: Tensor | None) -> Tensor:
        return exact(scale, tensor, alpha, out) * (math.nan if scale.module == "b" else 1)

    monkeypatch.setattr(Scale, "apply", broken)
    pairs = find_pairs(unquantized(model), rows())
    assert len(pairs) == 0
    assert "nan" in reason(pairs, "a")


def test_half_precision_finds_what_fp32_does() -> None:
    expected = names(find_pairs(decoder_sim(gpt2(1))))
    for dtype in (torch.bfloat16, torch.float16):
        assert names(find_pairs(decoder_sim(gpt2(1).to(dtype)))) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_go_into_the_copies_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that of a large weight there is one more, not two."""
    sim = decoder_sim(llama(1).to(dtype))
    own = {p.data_ptr() for p in sim.model.parameters()}
    apply, beside = Scale.apply, []

    def see(scale: Scale, tensor: Tensor, alpha: Tensor, out: Tensor | None) -> Tensor:
        scaled = apply(scale, tensor, alpha, out)
        beside.append(len({tensor.data_ptr(), scaled.data_ptr()} - own))
        assert scaled.dtype == torch.float32
        assert scaled.data_ptr() not in own
        return scaled

    monkeypatch.setattr(Scale, "apply", see)
    pairs = find_pairs(sim, kinds=["norm-linear", "norm-head", "v-o"])
    assert len(pairs) == 4
    assert set(beside) == {1}


def test_selection_and_its_errors() -> None:
    sim = decoder_sim(llama(2))
    assert {p.kind for p in find_pairs(sim, kinds=["v-o", "up-down"])} == {"v-o", "up-down"}
    assert len(find_pairs(sim, names="*.layers.1.*")) == 4
    assert len(find_pairs(sim, kinds="v-o", names="*.layers.1.*")) == 1
    assert len(find_pairs(sim, names="nothing")) == 0
    with pytest.raises(ValueError, match="gate-up"):
        find_pairs(sim, kinds=["gate-up"])


def test_a_recording_is_the_same_every_time() -> None:
    sim = decoder_sim(llama(1))
    inputs = sim.model.dummy_input()
    first, second = record(sim.model, inputs), record(sim.model, inputs)
    assert [(n.name, n.outputs, n.shapes) for n in first.nodes] == [
        (n.name, n.outputs, n.shapes) for n in second.nodes
    ]


@pytest.mark.slow
def test_a_deep_model_takes_its_layers_times_as_long() -> None:
    """The time grows with the layers: of their square it would be 16 times, not 4."""
    seconds = []
    for layers in (3, 12):
        sim = decoder_sim(gpt2(layers))
        find_pairs(sim)  # what is loaded at first use is loaded
        start = time.process_time()
        find_pairs(sim)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 10 * seconds[0]
