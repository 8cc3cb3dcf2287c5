from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from aimet_torch.common.quantsim_config.quantsim_config import _config_file_aliases
from aimet_torch.utils import remove_all_quantizers
from families import FAMILIES, VARIANTS
from tiny import VOCAB, decoder_sim, gpt2, llama, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from aimet_quadapter import UnsupportedModelError, prepare
from aimet_quadapter.models.attention import MASK_VALUE
from aimet_quadapter.models.families import FAMILIES as KNOWN

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}

BOTH = {"gpt2": gpt2, "llama": llama}
CONFIG_FILES = [n for n in _config_file_aliases if n == "default" or n.startswith("htp_")]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    hf = families.model(request.param)
    return hf, prepare(hf)


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS])
def every(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Models of every family and of every variant of its config."""
    hf = families.model(request.param)
    return hf, prepare(hf)


@pytest.fixture(params=BOTH)
def hf(request: pytest.FixtureRequest) -> Any:
    return BOTH[request.param]()


def padding(batch: int, length: int, side: str) -> Tensor:
    """An attention mask with 0, 2, 4 … padded places."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        if side == "left":
            mask[row, : 2 * row] = 0
        else:
            mask[row, length - 2 * row :] = 0
    return mask


def causal(length: int, low: float) -> Tensor:
    return torch.full((length, length), low).triu(1)[None, None]


@pytest.mark.parametrize("length", [1, 2, 13, 64])
@torch.no_grad()
def test_logits_equal(every: tuple[Any, Any], length: int) -> None:
    hf, prepared = every
    ids = tokens(3, length)
    assert_close(prepared(ids), hf(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_with_padding(every: tuple[Any, Any], side: str) -> None:
    hf, prepared = every
    ids, mask = tokens(4, 14), padding(4, 14, side)
    real = mask.bool()
    expected = hf(ids, attention_mask=mask).logits[real]
    assert_close(prepared(ids, mask)[real], expected, **TOLERANCE)
    assert_close(prepared(ids, real)[real], expected, **TOLERANCE)


@torch.no_grad()
def test_logits_equal_with_positions_and_padding(every: tuple[Any, Any]) -> None:
    hf, prepared = every
    ids, mask = tokens(4, 14), padding(4, 14, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = prepared(ids, mask, positions)
    expected = hf(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(got[mask.bool()], expected[mask.bool()], **TOLERANCE)


@torch.no_grad()
def test_logits_equal_with_other_positions(models: tuple[Any, Any]) -> None:
    hf, prepared = models
    ids, positions = tokens(2, 9), torch.stack([torch.arange(9) + 40, torch.arange(9) * 3])
    expected = hf(ids, position_ids=positions).logits
    assert_close(prepared(ids, None, positions), expected, **TOLERANCE)


@torch.no_grad()
def test_logits_equal_with_a_float_mask(models: tuple[Any, Any]) -> None:
    hf, prepared = models
    ids = tokens(2, 9)
    positions = torch.arange(9)[None]
    expected = hf(ids, position_ids=positions).logits
    for low in (MASK_VALUE, torch.finfo(torch.float32).min):
        assert_close(prepared(ids, causal(9, low), positions), expected, **TOLERANCE)


@torch.no_grad()
def test_a_boolean_4d_mask_is_true_where_a_token_is_seen(hf: Any) -> None:
    prepared, ids = prepare(hf), tokens(2, 9)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    assert_close(prepared(ids, seen), hf(ids).logits, **TOLERANCE)


def test_gradients_reach_every_parameter(models: tuple[Any, Any]) -> None:
    prepared = copy.deepcopy(models[1])
    prepared(tokens(3, 64)).square().mean().backward()
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None, name
        # No token of the batch may choose an expert.
        assert parameter.grad.abs().max() > 0 or ".experts." in name, name


def test_parameters_keep_their_names(models: tuple[Any, Any]) -> None:
    hf, prepared = models
    names = set(dict(hf.named_parameters(remove_duplicate=False)))
    own = {n for n in dict(prepared.named_parameters()) if ".experts." not in n}
    assert own == {n for n in names if ".experts." not in n}


def test_the_head_has_its_own_weight(models: tuple[Any, Any]) -> None:
    prepared = copy.deepcopy(models[1])
    embedding = next(m for m in prepared.modules() if isinstance(m, nn.Embedding))
    before = embedding.weight.clone()
    with torch.no_grad():
        prepared.lm_head.weight.zero_()
    assert_close(embedding.weight, before, atol=0, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_not_changed(hf: Any, training: bool) -> None:
    hf.train(training)
    state = copy.deepcopy(hf.state_dict())
    config, generation = hf.config.to_dict(), hf.generation_config.to_dict()
    prepared = prepare(hf)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.fill_(7)
    prepared.config.vocab_size = 3
    prepared.generate(tokens(1, 4), max_new_tokens=1, pad_token_id=0)
    assert not prepared.training
    assert all(m.training == training for m in hf.modules())
    assert hf.config.to_dict() == config
    assert hf.generation_config.to_dict() == generation
    assert hf.state_dict().keys() == state.keys()
    for name, tensor in hf.state_dict().items():
        assert_close(tensor, state[name], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision(hf: Any, dtype: torch.dtype) -> None:
    full = hf(tokens()).logits
    prepared = prepare(hf.to(dtype))
    assert {p.dtype for p in prepared.parameters()} == {dtype}
    assert {b.dtype for b in prepared.buffers()} == {torch.float32}
    ids, mask = tokens(), padding(2, 12, "left")
    for got in (prepared(ids), prepared(ids, mask), prepared(ids, causal(12, MASK_VALUE))):
        assert got.dtype == dtype
        assert got.isfinite().all()
    error = (prepared(ids) - full).abs().max()
    assert error <= 2 * (hf(ids).logits - full).abs().max() + 1e-3
    sim = decoder_sim(hf, calibrated=True)
    got = sim.model(ids)
    assert got.dtype == dtype
    assert got.isfinite().all()


def test_generate_gives_the_same_tokens(models: tuple[Any, Any]) -> None:
    hf, prepared = models
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    ids = tokens(3, 9)
    for mask in (torch.ones_like(ids), padding(3, 9, "left")):
        expected = hf.generate(ids, attention_mask=mask, **settings)
        got = prepared.generate(ids, attention_mask=mask, **settings)
        assert got.tolist() == expected.tolist()


def test_generate_takes_the_models_own_settings(hf: Any) -> None:
    hf.generation_config.max_new_tokens = 3
    hf.generation_config.pad_token_id = 0
    assert prepare(hf).generate(tokens(1, 4)).shape == (1, 7)


def test_generate_on_a_sim(hf: Any) -> None:
    sim = decoder_sim(hf, calibrated=True, default_param_bw=16, default_output_bw=16)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 6)
    got = sim.model.generate(ids, **settings)
    assert got.shape == (2, 11)
    assert got[:, :6].tolist() == ids.tolist()


@pytest.mark.parametrize("config_file", CONFIG_FILES)
@pytest.mark.parametrize("make", BOTH.values(), ids=list(BOTH))
@torch.no_grad()
def test_every_config_file_of_aimet(make: Any, config_file: str) -> None:
    sim = decoder_sim(make(layers=1), calibrated=True, config_file=config_file)
    assert sim.model(tokens()).isfinite().all()
    assert sim.model(tokens(3, 20), padding(3, 20, "left")).isfinite().all()


def test_what_a_sim_computes_without_quantizers_is_the_model(hf: Any) -> None:
    sim = decoder_sim(hf)
    with torch.no_grad(), remove_all_quantizers(sim.model):
        assert_close(sim.model(tokens()), hf(tokens()).logits, **TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_gpt2_at_its_real_shape() -> None:
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    prepared = prepare(hf)
    ids = torch.randint(0, 50257, (2, 128), generator=torch.Generator().manual_seed(0))
    mask = padding(2, 128, "left")
    assert_close(prepared(ids), hf(ids).logits, **TOLERANCE)
    got, expected = prepared(ids, mask), hf(ids, attention_mask=mask).logits
    assert_close(got[mask.bool()], expected[mask.bool()], **TOLERANCE)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_an_unknown_architecture_is_refused_with_what_is_missing() -> None:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(UnsupportedModelError) as e:
        prepare(BertForMaskedLM(config))
    text = str(e.value)
    assert "BertForMaskedLM" in text
    assert all(name in text for name in KNOWN)
    assert "BertSelfAttention" in text
    assert "docs/architectures.md" in text


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Own") as e:
        prepare(nn.Sequential(nn.Linear(2, 2), Own()))
    assert "find_pairs" in str(e.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        prepare("gpt2")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gpt2(add_cross_attention=True), ["cross-attention"]),
        (lambda: gpt2(activation_function="quick_gelu"), ["quick_gelu", "known"]),
        (
            lambda: gpt2(add_cross_attention=True, activation_function="mish"),
            ["cross-attention", "mish"],
        ),
        (lambda: llama(hidden_act="mish"), ["mish"]),
        (
            lambda: llama(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            ["rotary", "dynamic"],
        ),
    ],
)
def test_an_unknown_feature_is_refused_with_what_is_missing(make: Any, words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        prepare(make())
    assert all(word in str(e.value) for word in words)


def test_a_replaced_layer_is_refused(hf: Any) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    hf.lm_head = Adapter(32, VOCAB, bias=False)
    with pytest.raises(UnsupportedModelError, match="Adapter"):
        prepare(hf)


def test_a_replaced_inner_layer_is_refused() -> None:
    hf = gpt2()
    hf.transformer.h[0].mlp.c_fc = nn.Bilinear(32, 32, 128)
    with pytest.raises(UnsupportedModelError, match="Bilinear"):
        prepare(hf)


def test_a_replaced_layer_that_computes_the_same_is_taken() -> None:
    hf = gpt2()
    conv1d = hf.transformer.h[0].mlp.c_fc
    linear = nn.Linear(32, 128)
    linear.weight.data, linear.bias.data = conv1d.weight.data.t().clone(), conv1d.bias.data
    hf.transformer.h[0].mlp.c_fc = linear
    with torch.no_grad():
        assert_close(prepare(hf)(tokens()), hf(tokens()).logits, **TOLERANCE)


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        hf = GPT2LMHeadModel(gpt2().config)
    with pytest.raises(UnsupportedModelError, match="meta"):
        prepare(hf)


def test_a_patched_forward_is_refused(hf: Any) -> None:
    hf.lm_head.forward = lambda x: 0 * x
    with pytest.raises(UnsupportedModelError, match="patched"):
        prepare(hf)


def test_hooks_stay_with_the_callers_model(hf: Any) -> None:
    """As `device_map="auto"` leaves them: an instance forward would go around the quantizers."""
    head = hf.lm_head
    head._hf_hook, head._old_forward, head.forward = object(), head.forward, head.forward
    ran: list[bool] = []
    head.register_forward_hook(lambda *_: ran.append(True))
    sim = decoder_sim(hf)
    ran.clear()  # `prepare` calls the caller's model as the caller would
    sim.compute_encodings(lambda m: m(tokens()))
    assert not ran
    seen = sim.model.lm_head.output_quantizers[0]
    assert seen.is_initialized()
    assert not {"forward", "_hf_hook", "_old_forward"} & vars(sim.model.lm_head).keys()
