"""`prepare(model, share=True)`: a model on HuggingFace's own weights."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import FAMILIES
from tiny import gpt2, llama, tokens

from aimet_quadapter import prepare


def addresses(model: Any) -> list[int]:
    return sorted(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_same_model_with_and_without(name: str) -> None:
    hf = families.model(name)
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    shared, copied = prepare(hf, share=True), prepare(hf)
    assert torch.equal(shared(tokens()), copied(tokens()))
    assert shared.state_dict().keys() == copied.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in hf.state_dict().items())
    assert len(set(addresses(shared))) == len(addresses(shared))
    assert not set(addresses(copied)) & set(addresses(hf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_of_a_llama_is_copied(dtype: torch.dtype) -> None:
    hf = llama().to(dtype)
    assert addresses(prepare(hf, share=True)) == addresses(hf)


def test_a_tied_head_is_copied() -> None:
    hf = llama(tie_word_embeddings=True)
    prepared = prepare(hf, share=True)
    head, embedding = prepared.part("head").weight, prepared.part("embed").weight
    assert embedding.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
    assert head.data_ptr() != embedding.data_ptr()
    assert torch.equal(head, embedding)


def test_what_lies_otherwise_is_copied() -> None:
    hf = gpt2()
    prepared = prepare(hf, share=True)
    own = {n for n, p in prepared.named_parameters() if p.data_ptr() not in addresses(hf)}
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layers = {f"transformer.h.{i}.{linear}.weight" for i in range(2) for linear in linears}
    assert own == {"lm_head.weight", *layers}
