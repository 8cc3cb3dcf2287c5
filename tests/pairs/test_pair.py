from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import decoder_sim, gpt2, llama
from torch import nn
from torch.testing import assert_close

from aimet_quadapter import find_pairs
from aimet_quadapter.pairs.pair import (
    KINDS,
    Pair,
    Pairs,
    Scale,
    consumer_scale,
    producer_scales,
    scales_by_module,
)


def pair(kind: str = "norm-linear", producer: str = "a", *consumers: str, n: int = 3) -> Pair:
    consumers = consumers or ("b",)
    index = torch.arange(n)
    scales = (
        Scale(producer, "weight", index, divide=False),
        *(Scale(c, "weight", index[None], divide=True) for c in consumers),
    )
    return Pair(kind, producer, consumers, n, scales, (index,) * len(consumers), (), ())


def test_a_scale_multiplies_or_divides_where_its_index_says() -> None:
    alpha = torch.tensor([2.0, 4.0])
    weight = torch.ones(2, 3)
    index = torch.tensor([[1, -1, 0]])
    assert_close(
        Scale("m", "weight", index, divide=False).apply(weight, alpha),
        torch.tensor([[4.0, 1.0, 2.0]]).expand(2, 3),
    )
    assert_close(
        Scale("m", "weight", index, divide=True).apply(weight, alpha),
        torch.tensor([[0.25, 1.0, 0.5]]).expand(2, 3),
    )


def test_a_repeated_index_is_the_repeat_over_grouped_heads() -> None:
    alpha = torch.tensor([2.0, 3.0], requires_grad=True)
    scale = Scale("o_proj", "weight", torch.tensor([[0, 1, 0, 1]]), divide=False)
    scaled = scale.apply(torch.ones(1, 4), alpha)
    assert_close(scaled, torch.tensor([[2.0, 3.0, 2.0, 3.0]]))
    scaled.sum().backward()
    assert alpha.grad is not None
    assert_close(alpha.grad, torch.tensor([2.0, 2.0]))


def test_a_scale_keeps_the_dtype_of_the_weight() -> None:
    scale = Scale("m", "weight", torch.arange(2)[None], divide=True)
    assert (
        scale.apply(torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.bfloat16
    )


def layers() -> dict[str, tuple[nn.Module, nn.Module, Any]]:
    """Name → producer, consumer that reads its output, input of the producer."""
    return {
        "linear": (nn.Linear(3, 6), nn.Linear(6, 2), torch.randn(4, 3)),
        "layernorm": (nn.LayerNorm(6), nn.Linear(6, 2, bias=False), torch.randn(4, 6)),
        "batchnorm": (nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3), torch.randn(2, 6, 5, 5)),
        "conv": (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), torch.randn(2, 3, 7, 7)),
        "conv1d": (nn.Conv1d(3, 6, 3), nn.Conv1d(6, 4, 3), torch.randn(2, 3, 7)),
        "conv3d": (nn.Conv3d(1, 6, 2), nn.Conv3d(6, 4, 2), torch.randn(1, 1, 4, 4, 4)),
        "grouped": (
            nn.Conv2d(4, 6, 3, groups=2),
            nn.Conv2d(6, 9, 3, groups=3),
            torch.randn(2, 4, 7, 7),
        ),
        "depthwise": (
            nn.Conv2d(6, 6, 3, groups=6),
            nn.Conv2d(6, 12, 3, groups=6),
            torch.randn(2, 6, 7, 7),
        ),
        "transposed": (
            nn.ConvTranspose2d(3, 6, 3),
            nn.ConvTranspose2d(6, 4, 3),
            torch.randn(2, 3, 4, 4),
        ),
        "grouped transposed": (
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            nn.ConvTranspose2d(6, 9, 3, groups=3),
            torch.randn(2, 4, 4, 4),
        ),
        "transposed 1d": (
            nn.ConvTranspose1d(4, 6, 3, groups=2),
            nn.ConvTranspose1d(6, 6, 3, groups=6, bias=False),
            torch.randn(2, 4, 4),
        ),
    }


@pytest.mark.parametrize("name", layers())
@torch.no_grad()
def test_scaling_a_producer_and_its_consumer_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    producer, consumer, x = layers()[name]
    producer.eval()
    expected = consumer(producer(x))
    alpha = torch.rand(6) * 9.9 + 0.1
    index = torch.tensor([0, 1, 2, 3, -1, 5])  # one channel is left alone
    for scale in producer_scales("p", producer, index):
        getattr(producer, scale.parameter).copy_(
            scale.apply(getattr(producer, scale.parameter), alpha)
        )
    assert not torch.allclose(consumer(producer(x)), expected, atol=1e-3)
    scale = consumer_scale("c", consumer, index)
    consumer.weight.copy_(scale.apply(consumer.weight, alpha))
    assert_close(consumer(producer(x)), expected, atol=1e-4, rtol=1e-4)


def test_select_by_kind_and_name() -> None:
    pairs = Pairs(
        (
            pair("norm-linear", "h.0.ln", "h.0.q", "h.0.k"),
            pair("v-o", "h.0.v", "h.0.o"),
            pair("norm-linear", "h.1.ln", "h.1.q"),
        )
    )
    assert [p.producer for p in pairs.select(kinds=["norm-linear"])] == ["h.0.ln", "h.1.ln"]
    assert [p.producer for p in pairs.select(kinds="v-o")] == ["h.0.v"]
    assert [p.producer for p in pairs.select(names="h.0.*")] == ["h.0.ln", "h.0.v"]
    assert [p.producer for p in pairs.select(names="*.k")] == ["h.0.ln"]
    assert [p.producer for p in pairs.select(["v-o"], "h.1.*")] == []
    assert len(pairs.select()) == 3
    assert pairs.counts() == {"norm-linear": 2, "v-o": 1}
    assert pairs[0].producer == "h.0.ln"
    assert [p.producer for p in pairs[1:]] == ["h.0.v", "h.1.ln"]


@pytest.mark.parametrize("kinds", ["norm_linear", ["v-o", "nothing"]])
def test_an_unknown_kind_is_named_with_those_known(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"norm_linear|nothing") as e:
        Pairs((pair(),)).select(kinds=kinds)
    assert all(k in str(e.value) for k in KINDS)


def test_scales_by_module_joins_what_enters_one_module() -> None:
    both = [pair("norm-linear", "a", "b"), pair("linear-linear", "b", "c")]
    alphas = {p.name: torch.ones(3) for p in both}
    found = scales_by_module(both, alphas)
    assert {name: [s.divide for s, _ in entries] for name, entries in found.items()} == {
        "a": [False],
        "b": [True, False],
        "c": [True],
    }


def test_gpt2_has_the_papers_pairs() -> None:
    for layers in (1, 3):
        sim = decoder_sim(gpt2(layers))
        pairs = find_pairs(sim, kinds=sim.model.default_kinds)
        assert len(pairs) == 2 * layers + 1
        assert pairs.counts() == {"norm-linear": 2 * layers, "norm-head": 1}
        block = "transformer.h.0"
        assert [(p.producer, p.consumers) for p in pairs][:2] == [
            (f"{block}.ln_1", (f"{block}.attn.c_attn",)),
            (f"{block}.ln_2", (f"{block}.mlp.c_fc",)),
        ]
        assert (pairs[-1].producer, pairs[-1].consumers) == ("transformer.ln_f", ("lm_head",))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "expected"), [(12, 25), (6, 13)])
def test_the_papers_number_of_pairs(layers: int, expected: int) -> None:
    sim = decoder_sim(gpt2(layers))
    assert len(find_pairs(sim, kinds=sim.model.default_kinds)) == expected


def test_value_and_output_are_found_in_gpt2s_fused_projection() -> None:
    pairs = find_pairs(decoder_sim(gpt2(1)), kinds=["v-o"])
    (found,) = pairs
    assert found.producer == "transformer.h.0.attn.c_attn"
    assert found.consumers == ("transformer.h.0.attn.c_proj",)
    assert found.channels == 32
    weight, bias, out = found.scales
    assert (weight.parameter, bias.parameter, out.divide) == ("weight", "bias", True)
    assert (bias.index[:64] == -1).all()  # queries and keys
    assert bias.index[64:].tolist() == list(range(32))
    assert out.index.flatten().tolist() == list(range(32))


def test_llama_has_every_kind() -> None:
    sim = decoder_sim(llama(2))
    pairs = find_pairs(sim)
    assert pairs.counts() == {"norm-linear": 4, "norm-head": 1, "up-down": 2, "v-o": 2}
    assert len(pairs) == len(find_pairs(sim, kinds=sim.model.default_kinds))
    layer = "model.layers.0"
    by_producer = {p.producer: p for p in pairs}
    norm = by_producer[f"{layer}.input_layernorm"]
    assert norm.consumers == tuple(f"{layer}.self_attn.{p}_proj" for p in "qkv")
    assert norm.channels == 32
    assert by_producer[f"{layer}.mlp.up_proj"].channels == 48
    assert norm.ways[0][0] == (0, norm.producer)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_scales_of_grouped_queries_live_on_the_kv_heads(kv_heads: int) -> None:
    (found,) = find_pairs(decoder_sim(llama(1, num_key_value_heads=kv_heads)), kinds=["v-o"])
    head = 8
    assert found.channels == kv_heads * head
    columns = found.columns[0].reshape(4, head)
    expected = torch.arange(kv_heads * head).reshape(kv_heads, head)
    assert_close(columns, expected.repeat_interleave(4 // kv_heads, dim=0))


def test_what_is_refused_says_why() -> None:
    reasons = {r.producer: r.reason for r in find_pairs(decoder_sim(gpt2(1))).refused}
    block = "transformer.h.0"
    assert "residual" in reasons[f"{block}.attn.c_proj"]
    assert "GELU" in reasons[f"{block}.mlp.c_fc"]
    assert "residual" in reasons[f"{block}.mlp.c_proj"]
    assert "output" in reasons["lm_head"]
    reasons = {r.producer: r.reason for r in find_pairs(decoder_sim(llama(1))).refused}
    layer = "model.layers.0"
    assert re.search("SiLU|Sigmoid", reasons[f"{layer}.mlp.gate_proj"])
    assert "rotary" in reasons[f"{layer}.self_attn.q_proj"]
    assert "rotary" in reasons[f"{layer}.self_attn.k_proj"]
    assert "residual" in reasons[f"{layer}.mlp.down_proj"]


def test_relu_gpt2_has_pairs_through_the_activation() -> None:
    pairs = find_pairs(decoder_sim(gpt2(1, activation_function="relu")))
    (found,) = pairs.select("linear-relu-linear")
    assert found.consumers == ("transformer.h.0.mlp.c_proj",)
    assert found.between == ("transformer.h.0.mlp.act",)


def test_pairs_print_one_to_a_line() -> None:
    pairs = find_pairs(decoder_sim(gpt2(1)))
    lines = str(pairs).splitlines()
    assert len(lines) == len(pairs) + len(pairs.refused)
    assert lines[0].startswith("norm-linear: transformer.h.0.ln_1 -> ")
    assert lines[-1].startswith("refused: ")
