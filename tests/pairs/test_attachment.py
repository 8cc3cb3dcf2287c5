from __future__ import annotations

import copy
import errno
import io
from typing import Any

import pytest
import torch
from aimet_torch.utils import remove_all_quantizers
from tiny import decoder_sim, gpt2, llama, scaled, tokens
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import SimError, UnfoldedError, find_pairs, fold
from aimet_quadapter.pairs import attachment
from aimet_quadapter.pairs.attachment import (
    attach,
    attached_modules,
    attached_scales,
    detach,
    is_attached,
    values_restored,
)
from aimet_quadapter.pairs.folding import folds_in_turn
from aimet_quadapter.pairs.pair import Pairs

CASES = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Pairs]:
    sim = decoder_sim(CASES[request.param](1), calibrated=True)
    for parameter in sim.model.parameters():
        parameter.requires_grad_(True)
    return sim, find_pairs(sim)


@pytest.fixture(autouse=True)
def detached(case: tuple[Any, Pairs]) -> Any:
    yield
    detach(case[0])
    case[0].model.zero_grad()


def random_alphas(pairs: Pairs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        p.name: nn.Parameter(torch.exp(torch.randn(p.channels, generator=generator)).to(dtype))
        for p in pairs
    }


def state(sim: Any) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in sim.model.named_parameters()}


def test_the_output_without_quantizers_stays(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    with torch.no_grad(), remove_all_quantizers(sim.model):
        expected = sim.model(tokens())
        attach(sim, pairs, random_alphas(pairs))
        got = sim.model(tokens())
    assert not torch.equal(got, expected)
    assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_scales_and_the_ranges_of_the_weights(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    alphas = random_alphas(pairs)
    attach(sim, pairs, alphas)
    sim.model(tokens()).square().mean().backward()
    for name, alpha in alphas.items():
        assert alpha.grad is not None, name
        assert (alpha.grad != 0).any(), name
        assert alpha.grad.isfinite().all(), name
    for name in attached_modules(sim):
        quantizer = sim.model.get_submodule(name).param_quantizers["weight"]
        for end in (quantizer.min, quantizer.max):
            assert end.grad is not None, name
            assert end.grad.isfinite().all(), name
        assert (quantizer.min.grad != 0).any() or (quantizer.max.grad != 0).any(), name


def test_scales_enter_before_the_weight_quantizer(case: tuple[Any, Pairs]) -> None:
    """With quantizers on, attached α computes what a sim with scaled weights does."""
    sim, pairs = case
    alphas = random_alphas(pairs)
    with torch.no_grad():
        plain = sim.model(tokens())
        with scaled(sim.model, pairs, alphas):
            expected = sim.model(tokens())
        attach(sim, pairs, alphas)
        assert_close(sim.model(tokens()), expected, atol=0, rtol=0)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_detach_restores_exactly(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    before, attributes = state(sim), {n: set(vars(m)) for n, m in sim.model.named_modules()}
    with torch.no_grad():
        expected = sim.model(tokens())
        attach(sim, pairs, random_alphas(pairs))
        assert is_attached(sim)
        sim.model(tokens())
        detach(sim)
        assert not is_attached(sim)
        assert_close(sim.model(tokens()), expected, atol=0, rtol=0)
    assert_close(state(sim), before, atol=0, rtol=0)
    assert {n: set(vars(m)) for n, m in sim.model.named_modules()} == attributes
    detach(sim)  # nothing to do


def test_what_is_attached_is_listed(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    assert attached_modules(sim) == []
    alphas = random_alphas(pairs)
    attach(sim, pairs, alphas)
    expected = {s.module for p in pairs for s in p.scales}
    assert set(attached_modules(sim)) == expected
    scales = attached_scales(sim)
    assert sum(len(s) for s in scales.values()) == sum(len(p.scales) for p in pairs)
    assert {id(a) for entries in scales.values() for _, a in entries} == {
        id(a) for a in alphas.values()
    }


def test_the_scales_are_no_part_of_the_state(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    keys = list(sim.model.state_dict())
    attach(sim, pairs, random_alphas(pairs))
    assert list(sim.model.state_dict()) == keys


def test_a_deep_copy_has_its_own_scales(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    attach(sim, pairs, random_alphas(pairs))
    with torch.no_grad():
        other = copy.deepcopy(sim.model)
        expected = sim.model(tokens())
        assert_close(other(tokens()), expected, atol=0, rtol=0)
        for parameter in other.parameters():
            parameter.zero_()
        for module in other.modules():
            for _, alpha in vars(module).get("_quadapter_scales", []):
                alpha.fill_(1)
        assert_close(sim.model(tokens()), expected, atol=0, rtol=0)
        assert not torch.equal(other(tokens()), expected)


def test_a_forward_of_the_module_itself_comes_back(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    module = sim.model.get_submodule(pairs[0].producer)
    calls = []

    def own(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return type(module).forward(module, x)

    module.forward = own
    try:
        attach(sim, pairs, random_alphas(pairs))
        sim.model(tokens())
        assert len(calls) == 1
        detach(sim)
        assert module.forward is own
    finally:
        del module.forward


def test_attaching_twice_is_refused(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    attach(sim, pairs[:1], random_alphas(pairs))
    with pytest.raises(UnfoldedError, match="detach") as e:
        attach(sim, pairs, random_alphas(pairs))
    assert pairs[0].producer in str(e.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda a: a * 0, "positive"),
        (lambda a: -a, "positive"),
        (lambda a: a * float("nan"), "nan"),
        (lambda a: a * float("inf"), "inf"),
        (lambda a: a[:-1], "shape"),
        (lambda a: a[None], "shape"),
    ],
)
def test_a_bad_scale_is_refused_and_nothing_is_attached(
    case: tuple[Any, Pairs], value: Any, words: str
) -> None:
    sim, pairs = case
    alphas: dict[str, Tensor] = dict(random_alphas(pairs))
    name = pairs[-1].name
    alphas[name] = value(alphas[name].detach())
    with pytest.raises(ValueError, match=words) as e:
        attach(sim, pairs, alphas)
    assert name in str(e.value)
    assert not is_attached(sim)


def test_a_missing_scale_is_refused(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    alphas = random_alphas(pairs)
    del alphas[pairs[-1].name]
    with pytest.raises(ValueError, match="no α"):
        attach(sim, pairs, alphas)
    assert not is_attached(sim)


def test_pairs_of_another_model_are_refused(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    other = find_pairs(decoder_sim((llama if "c_attn" in str(pairs) else gpt2)(1)))
    before = state(sim)
    with pytest.raises(ValueError, match="another model"):
        attach(sim, other, random_alphas(other))
    assert not is_attached(sim)
    with pytest.raises(ValueError, match="another model"):
        fold(sim, other, random_alphas(other))
    assert_close(state(sim), before, atol=0, rtol=0)


def test_scaled_ends_with_an_error_too(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    before = state(sim)
    with (
        pytest.raises(RuntimeError, match="on the way"),
        scaled(sim.model, pairs, random_alphas(pairs)),
    ):
        raise RuntimeError("on the way")
    assert_close(state(sim), before, atol=0, rtol=0)
    assert all(isinstance(p, nn.Parameter) for p in sim.model.parameters())


def test_half_precision_weights_take_fp32_scales() -> None:
    sim = decoder_sim(gpt2(1).bfloat16(), calibrated=True)
    pairs = find_pairs(sim)
    alphas = random_alphas(pairs)
    attach(sim, pairs, alphas)
    out = sim.model(tokens())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all((a.grad != 0).any() for a in alphas.values())


def test_values_of_every_kind_come_back_to_the_bit() -> None:
    tensors = [
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(4, 6).T,
        torch.tensor(0.1, dtype=torch.float64),
        torch.empty(0, 3),
    ]
    before = [t.clone() for t in tensors]
    with values_restored(tensors):
        for tensor in tensors:
            tensor.fill_(7)
    assert all(map(torch.equal, tensors, before))


def test_without_room_for_copies_nothing_is_changed(monkeypatch) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attachment, "TemporaryFile", Full)
    tensor = torch.ones(3)
    with pytest.raises(OSError, match="No space"), values_restored([tensor]):
        tensor.zero_()
    assert torch.equal(tensor, torch.ones(3))


def test_folds_in_turn_are_those_of_the_weights_as_they_were(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    before = state(sim)
    first = {name: alpha.detach() for name, alpha in random_alphas(pairs).items()}
    kind = pairs[0].kind
    ones = {p.name: torch.ones(p.channels) for p in pairs}
    mixed = first | {p.name: ones[p.name] for p in pairs if p.kind == kind}
    with folds_in_turn(sim, pairs) as fold_these:
        for alphas in (first, mixed, ones, mixed):
            fold_these(alphas)
            of_turn = state(sim)
            other = copy.deepcopy(sim)
            for name, value in before.items():
                other.model.get_parameter(name).data.copy_(value)
            fold(other, pairs, alphas)
            assert not [n for n, x in state(other).items() if not torch.equal(x, of_turn[n])]
    assert not [n for n, x in state(sim).items() if not torch.equal(x, before[n])]


def test_a_turn_touches_what_its_new_alphas_enter_alone(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    first = {name: alpha.detach() for name, alpha in random_alphas(pairs).items()}
    *_, last = pairs
    touched = {scale.module for scale in last.scales}
    with folds_in_turn(sim, pairs) as fold_these:
        fold_these(first)
        for parameter in sim.model.parameters():
            parameter.data.fill_(7)
        fold_these(first | {last.name: torch.ones(last.channels)})
        changed = {n.rpartition(".")[0] for n, x in state(sim).items() if not (x == 7).all()}
        assert changed == touched


def test_a_turn_that_is_refused_leaves_the_weights_as_they_were(case: tuple[Any, Pairs]) -> None:
    sim, pairs = case
    before = state(sim)
    random = {name: alpha.detach() for name, alpha in random_alphas(pairs).items()}
    with folds_in_turn(sim, pairs) as fold_these:
        fold_these(random)
        folded = state(sim)
    far = random | {p.name: torch.full((p.channels,), 1e-42) for p in pairs[1:]}
    none = {p.name: torch.zeros(p.channels) for p in pairs}
    for alphas, error in ((far, SimError), (none, ValueError)):
        with folds_in_turn(sim, pairs) as fold_these:
            fold_these(random)
            with pytest.raises(error):
                fold_these(alphas)
            fold_these(random)
            assert not [n for n, x in state(sim).items() if not torch.equal(x, folded[n])]
            with pytest.raises(ValueError, match="no α"):
                fold_these({})
        assert not [n for n, x in state(sim).items() if not torch.equal(x, before[n])]
