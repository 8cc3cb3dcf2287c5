"""`prepare` checks what it promises, on the model's own scores."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny import decoder_sim, gpt2, llama, tokens
from torch import nn
from torch.testing import assert_close

from aimet_quadapter import UnsupportedModelError, prepare
from aimet_quadapter.exporting.cached_model import find_cached
from aimet_quadapter.models.attention import MASK_VALUE
from aimet_quadapter.models.decoder import PreparedDecoder


def sharpened(hf: Any, factor: float) -> Any:
    """The model with its query weights multiplied, and so its scores."""
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "q_proj" in name:
                parameter *= factor
            if "c_attn.weight" in name:
                parameter[:, : hf.config.n_embd] *= factor
    return hf


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("factor", [30.0, 100.0])
@torch.no_grad()
def test_a_mask_hides_tokens_whatever_the_scores(
    make: Any, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    hf = sharpened(make(), factor)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(hf)
    assert prepared.mask_value < MASK_VALUE
    assert f"{prepared.mask_value:.0f}" in caplog.text
    assert "compensate_softmax" in caplog.text
    for length in (3, 12, 40):
        assert_close(prepared(tokens(2, length)), hf(tokens(2, length)).logits, atol=1e-4, rtol=0)
    sim = decoder_sim(hf, calibrated=True)
    assert sim.model.mask_value == prepared.mask_value
    assert find_cached(sim.model)  # compares logits with a cache, and its mask, with those without


@pytest.mark.parametrize("make", [gpt2, llama])
def test_usual_scores_keep_the_usual_mask(make: Any) -> None:
    assert prepare(make()).mask_value == MASK_VALUE


def test_scores_that_no_mask_hides_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="float16"):
        prepare(sharpened(llama().to(torch.float16), 60_000.0))


@pytest.mark.parametrize(
    ("break_it", "module"),
    [
        (lambda m: setattr(m.model.layers[1].input_layernorm, "eps", 1.0), "1.input_layernorm"),
        (lambda m: m.model.layers[0].self_attn.attention.scale.mul_(2), "0.self_attn"),
        (lambda m: m.signed_sin.neg_(), "0.self_attn"),
        (lambda m: setattr(m.model.layers[1].mlp, "act", nn.ReLU()), "1.mlp.act_fn|1.mlp"),
        (lambda m: m.model.embed_tokens.weight.data.mul_(2), "model.embed_tokens"),
        (lambda m: m.lm_head.weight.data.mul_(2), "lm_head"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prepared_model_that_differs_is_refused_with_its_first_module(
    break_it: Any, module: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = PreparedDecoder.__init__

    def broken(self: Any, *args: Any) -> None:
        build(self, *args)
        break_it(self)

    monkeypatch.setattr(PreparedDecoder, "__init__", broken)
    with pytest.raises(UnsupportedModelError, match=f"first module that differs is .*({module})"):
        prepare(llama().to(dtype))


def test_a_difference_that_only_padding_shows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PreparedDecoder.forward

    def unpadded(self: Any, ids: Any, attention_mask: Any = None, *args: Any) -> Any:
        return forward(self, ids, None, *args)

    monkeypatch.setattr(PreparedDecoder, "forward", unpadded)
    with pytest.raises(UnsupportedModelError, match="differs"):
        prepare(llama())


def test_a_model_that_gives_nan_is_refused() -> None:
    hf = llama()
    hf.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(UnsupportedModelError, match="itself gives NaN"):
        prepare(hf)


def test_a_half_precision_model_keeps_its_bits() -> None:
    hf = llama().to(torch.bfloat16)
    before = {n: t.clone() for n, t in hf.state_dict().items()}
    prepare(hf)
    assert all(torch.equal(t, before[n]) for n, t in hf.state_dict().items())
