"""Descriptions: a wrong one is refused, whatever is wrong; an unknown class is read as a known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import families
import pytest
import torch
import transformers
from families import FAMILIES, LLAMA, VARIANTS, build
from tiny import llama, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from aimet_quadapter import UnsupportedModelError, prepare
from aimet_quadapter.models import description as described
from aimet_quadapter.models.description import MLP, Attention, Decoder, Layer
from aimet_quadapter.models.norms import norm_of
from aimet_quadapter.models.preparation import _described

Change = Callable[[Decoder], Decoder]


def attention(**changes: Callable[[Attention], Any]) -> Change:
    """A description whose every attention is changed."""

    def change(d: Decoder) -> Decoder:
        def of(a: Attention) -> Attention:
            return replace(a, **{name: new(a) for name, new in changes.items()})

        return replace(d, layers=tuple(replace(x, attention=of(x.attention)) for x in d.layers))

    return change


def layer(**changes: Callable[[Layer], Any]) -> Change:
    """A description whose every layer is changed."""

    def change(d: Decoder) -> Decoder:
        def of(x: Layer) -> Layer:
            return replace(x, **{name: new(x) for name, new in changes.items()})

        return replace(d, layers=tuple(map(of, d.layers)))

    return change


def mlp(**changes: Callable[[MLP], Any]) -> Change:
    """A description whose every MLP is changed."""
    return layer(
        mlp=lambda x: replace(x.mlp, **{name: new(x.mlp) for name, new in changes.items()})
    )


def model(**changes: Callable[[Decoder], Any]) -> Change:
    """A changed description."""
    return lambda d: replace(d, **{name: new(d) for name, new in changes.items()})


FLIPS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "heads": (
        attention(heads=lambda a: 2 * a.heads, kv_heads=lambda a: 2 * a.kv_heads),
        ("gpt2", "llama", "bloom"),
    ),
    "kv_heads": (attention(kv_heads=lambda a: a.heads), ("llama", "phi3", "mistral")),
    "head_size": (attention(head_size=lambda a: 2 * a.head_size), ("llama", "gpt_neox", "falcon")),
    "scale": (attention(scale=lambda a: 1.1 * a.scale), ("gpt2", "llama", "gemma2", "granite")),
    "softcap": (
        attention(softcap=lambda a: None if a.softcap else 2.0),
        ("gemma2", "llama", "opt"),
    ),
    "window": (
        attention(window=lambda a: None if a.window else 4),
        ("mistral", "gemma2", "gemma3", "gpt_neo", "starcoder2", "qwen2", "gpt2"),
    ),
    "window by one": (
        attention(window=lambda a: a.window and a.window + 1),
        ("mistral", "gemma3", "gpt_neo", "gemma2", "starcoder2"),
    ),
    "rotary": (attention(rotary=lambda _: None, rotary_size=lambda _: 0), ("llama", "phi", "gptj")),
    "rotary of some layers": (
        attention(rotary=lambda _: "", rotary_size=lambda a: a.head_size),
        ("smollm3",),
    ),
    "rotary table": (attention(rotary=lambda _: "full_attention"), ("gemma3",)),
    "rotary_size": (attention(rotary_size=lambda a: a.rotary_size // 2), ("llama", "phi", "gptj")),
    "interleaved": (
        attention(interleaved=lambda a: not a.interleaved),
        ("llama", "cohere", "gptj", "phi3", "gpt_neox"),
    ),
    "alibi": (attention(alibi=lambda a: not a.alibi), ("bloom", "gpt2")),
    "grouped": (attention(grouped=lambda a: not a.grouped), ("gpt2", "gpt_neox", "bloom", "phi3")),
    "activation": (
        mlp(activation=lambda m: "silu" if m.activation == "relu2" else "relu2"),
        tuple(FAMILIES),
    ),
    "experts_per_token": (
        mlp(experts_per_token=lambda m: m.experts_per_token and 1),
        ("mixtral", "qwen3_moe"),
    ),
    "normalized": (mlp(normalized=lambda m: not m.normalized), ("mixtral", "qwen3_moe")),
    "experts": (mlp(experts=lambda m: m.experts and 3), ("mixtral", "qwen3_moe")),
    "parallel": (
        layer(parallel=lambda x: not x.parallel),
        ("gpt2", "llama", "phi", "gpt_neox", "cohere", "falcon"),
    ),
    "branch_scale": (layer(branch_scale=lambda x: 1.1 * x.branch_scale), ("granite", "llama")),
    "a norm left out": (
        layer(parts=lambda x: {k: v for k, v in x.parts.items() if k != "mlp_norm"}),
        ("llama", "gpt2", "gemma3"),
    ),
    "a norm elsewhere": (
        layer(
            parts=lambda x: {
                {"attn_norm": "attn_norm_after"}.get(k, k): v for k, v in x.parts.items()
            }
        ),
        ("llama", "gpt2", "opt"),
    ),
    "norms of queries left out": (
        layer(parts=lambda x: {k: v for k, v in x.parts.items() if k != "q_norm"}),
        ("qwen3", "gemma3", "olmo2"),
    ),
    "gate for up": (
        layer(parts=lambda x: x.parts | {"gate": x.parts["up"], "up": x.parts["gate"]}),
        ("llama", "gemma"),
    ),
    "position_offset": (model(position_offset=lambda d: 2 - d.position_offset), ("opt", "gpt2")),
    "positions_from_mask": (
        model(positions_from_mask=lambda d: not d.positions_from_mask),
        ("opt", "gpt2", "gpt_neo"),
    ),
    "embedding_scale": (
        model(embedding_scale=lambda d: 1.1 * d.embedding_scale),
        tuple(n for n in FAMILIES if n != "bloom"),  # a norm comes next
    ),
    "logit_scale": (model(logit_scale=lambda d: 1.1 * d.logit_scale), tuple(FAMILIES)),
    "logit_softcap": (
        model(logit_softcap=lambda d: None if d.logit_softcap else 2.0),
        ("gemma2", "llama", "gpt2"),
    ),
    "layers": (model(layers=lambda d: d.layers[:1]), ("llama", "gpt2")),
}
"""What is wrong → a change of a description, and the families it is tried on."""


@pytest.mark.parametrize(("flip", "name"), [(f, n) for f, (_, on) in FLIPS.items() for n in on])
def test_a_wrong_description_is_refused(flip: str, name: str) -> None:
    hf = families.model(name)
    right = described.FAMILIES[type(hf).__name__](hf.config)
    wrong = FLIPS[flip][0](right)
    assert wrong != right
    _described(hf, right)
    with pytest.raises(UnsupportedModelError):
        _described(hf, wrong)


def test_every_field_of_a_description_is_tried() -> None:
    names = {f.name for cls in (Attention, MLP, Layer, Decoder) for f in fields(cls)}
    # What holds the others, names, and what changes no logits.
    others = {"attention", "mlp", "parts", "positions", "kinds", "missing"}
    assert names - others <= FLIPS.keys()


def test_a_part_that_no_description_has_is_refused() -> None:
    right = described.FAMILIES["LlamaForCausalLM"](llama().config)
    with pytest.raises(ValueError, match=r"no such part: query\. Known are"):
        replace(right.layers[0], parts={"query": "q"})


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
@torch.no_grad()
def test_the_map_of_weights_runs_both_ways(name: str) -> None:
    hf = families.model(name)
    prepared = prepare(hf)
    ids = tokens()
    expected = hf(ids).logits
    tied = hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    own = {w.hf: hf.get_parameter(w.hf).clone() for w in prepared.weights}
    for parameter in hf.parameters():
        parameter.zero_()
    for weight in prepared.weights:
        head = tied and weight.hf == "lm_head.weight"
        target = torch.empty_like(own[weight.hf]) if head else hf.get_parameter(weight.hf)
        weight.give(prepared.get_parameter(weight.name), target)
        if head:  # the tied weight, computed the other way
            assert_close(target, own[weight.hf], atol=1e-6, rtol=1e-5)
    assert_close(hf(ids).logits, expected, atol=1e-5, rtol=0)


INFERRED = {
    "Ernie4_5ForCausalLM": "LlamaForCausalLM with interleaved",
    "Exaone4ForCausalLM": "Olmo2ForCausalLM",
    "OlmoForCausalLM": "LlamaForCausalLM",
    "SeedOssForCausalLM": "LlamaForCausalLM",
}
"""HuggingFace's classes that have no file, and what they are read as."""


@pytest.mark.parametrize("name", [n for n in INFERRED if hasattr(transformers, n)])
@torch.no_grad()
def test_an_unknown_class_is_read_as_a_known_one(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    hf = build(name, LLAMA)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(hf)
    assert f"{name} is not a known class: it was read as {INFERRED[name]}" in caplog.text
    assert prepared.hf_class == name
    assert_close(prepared(tokens()), hf(tokens()).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_subclass_is_read_as_its_base(caplog: pytest.LogCaptureFixture) -> None:
    class Tuned(LlamaForCausalLM):
        """A fine-tune's own class."""

    hf = llama()
    hf.__class__ = Tuned
    with caplog.at_level(logging.WARNING):
        prepared = prepare(hf)
    assert "Tuned is not a known class: it was read as LlamaForCausalLM" in caplog.text
    assert_close(prepared(tokens()), hf(tokens()).logits, atol=1e-4, rtol=0)


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    class Colder(LlamaForCausalLM):
        """As a fine-tune with a temperature of its own."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 0.9
            return output

    hf = llama()
    hf.__class__ = Colder
    with pytest.raises(UnsupportedModelError, match=r"Read as LlamaForCausalLM.*factor or a cap"):
        prepare(hf)


def test_norms_are_found_by_what_they_compute() -> None:
    class Mine(torch.nn.Module):
        """RMSNorm under another name, with its eps inside the formula."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    found = norm_of(Mine())
    assert found is not None
    assert (found.centred, found.eps, found.offset) == (False, 1e-6, 1.0)
    assert norm_of(torch.nn.LayerNorm(8)) == (True, 1e-5, 0.0)
    others = (
        torch.nn.GroupNorm(1, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.PReLU(8),
        torch.nn.Linear(8, 8),
        torch.nn.LayerNorm((4, 8)),
        torch.nn.Sequential(torch.nn.LayerNorm(8)),
    )
    assert [norm_of(m) for m in others] == [None] * len(others)
