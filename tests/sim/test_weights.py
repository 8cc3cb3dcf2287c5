"""Weights quantized once for many passes: the same output to the bit, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.utils import remove_all_quantizers
from tiny import assert_same, batches, decoder_sim, gpt2, llama, logits, make_sim, state, tokens
from torch import Tensor, nn

from aimet_quadapter import attach, find_pairs, perplexity, set_ranges
from aimet_quadapter.sim import ranges, weights
from aimet_quadapter.sim.weights import quantized_once


class TiedTwice(nn.Module):
    """One weight in two linears, the second of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def sim(request) -> QuantizationSimModel:
    sim = decoder_sim(request.param(), config_file="htp_v73")
    set_ranges(sim, batches())
    return sim


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[int]]:
    """The quantizer of each tensor that is quantized, by its id."""
    found: list[int] = []
    forward = QuantizeDequantize.forward

    def counted(self: QuantizeDequantize, x: Tensor) -> Tensor:
        found.append(id(self))
        return forward(self, x)

    monkeypatch.setattr(QuantizeDequantize, "forward", counted)
    return found


def of_weights(sim: QuantizationSimModel) -> set[int]:
    return {id(q) for n, q in sim.named_quantizers() if "param_quantizers" in n}


def test_the_output_is_the_same_and_no_weight_is_quantized(sim, calls) -> None:
    before, output = state(sim), logits(sim)
    weights = of_weights(sim)
    with quantized_once(sim.model):
        calls.clear()
        for _ in range(2):
            assert torch.equal(logits(sim), output)
        assert calls
        assert not weights & set(calls)
        assert_same(sim, before)
    assert_same(sim, before)
    calls.clear()
    assert torch.equal(logits(sim), output)
    assert weights & set(calls)


def test_more_than_may_be_kept_is_computed_in_each_pass(sim, calls) -> None:
    calls.clear()
    output, every = logits(sim), of_weights(sim) & set(calls)
    modules = [m for _, m in sim.named_qmodules() if "weight" in m.param_quantizers]
    largest = 4 * max(m.weight.numel() for m in modules)

    def computed(limit: float) -> set[int]:
        with quantized_once(sim.model, limit):
            calls.clear()
            assert torch.equal(logits(sim), output)
        return of_weights(sim) & set(calls)

    assert set() < computed(largest) < every
    assert computed(largest - 1) == every
    assert computed(100 * largest) == set()


def test_windows_and_samples_that_follow_each_other_quantize_a_weight_once(
    sim, calls, monkeypatch
) -> None:
    ids = tokens(1, 65)[0]
    measure = lambda: perplexity(sim, ids, window=16, progress=False)  # noqa: E731
    samples = [x[None] for x in ids[:64].split(16)]

    def most_of_a_weight() -> int:
        found = max(calls.count(q) for q in of_weights(sim))
        calls.clear()
        return found

    def both(times: int) -> tuple[float, list[Any]]:
        calls.clear()
        set_ranges(sim, samples)
        assert most_of_a_weight() == times
        found = measure()
        assert most_of_a_weight() == times
        return found, [q.get_min() for q in sim.quantizers()]

    once = both(1)
    for module in (ranges, weights):
        monkeypatch.setattr(module, "quantized_once", partial(quantized_once, limit=0))
    again = both(4)
    assert again[0] == once[0]
    assert all(map(torch.equal, again[1], once[1]))


def test_without_quantizers_the_weights_are_the_plain_ones(sim) -> None:
    with remove_all_quantizers(sim.model):
        plain = logits(sim)
    with quantized_once(sim.model), remove_all_quantizers(sim.model):
        assert torch.equal(logits(sim), plain)


def test_an_attached_scale_still_counts(sim) -> None:
    pairs = find_pairs(sim)
    attach(sim, pairs, {p.name: torch.full((p.channels,), 2.0) for p in pairs})
    output = logits(sim)
    with quantized_once(sim.model):
        assert torch.equal(logits(sim), output)


def test_tied_weights_and_biases_are_those_of_their_own_quantizers() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    sim = make_sim(TiedTwice(), x)
    sim.model.second.param_quantizers["bias"] = QuantizeDequantize((), -8, 7, symmetric=True)
    sim.model.second.param_quantizers["weight"].bitwidth = 4
    sim.compute_encodings(lambda model: model(x))
    assert sim.model.first.weight is sim.model.second.weight
    with torch.no_grad():
        output = sim.model(x)
        with quantized_once(sim.model):
            assert torch.equal(sim.model(x), output)
        shared = sim.model.first.param_quantizers["weight"]
        sim.model.second.param_quantizers["weight"] = shared  # one quantizer, two modules
        output = sim.model(x)
        with quantized_once(sim.model):
            assert torch.equal(sim.model(x), output)


def test_after_an_exception_the_sim_is_as_it_was(sim, calls) -> None:
    before, output = state(sim), logits(sim)
    with pytest.raises(KeyboardInterrupt), quantized_once(sim.model):
        raise KeyboardInterrupt
    assert_same(sim, before)
    assert not any("forward" in q.__dict__ for _, q in sim.named_quantizers())
    calls.clear()
    assert torch.equal(logits(sim), output)
    assert of_weights(sim) <= set(calls)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_weight_is_tried_on_grids_of_8_bits_at_most(bits, monkeypatch) -> None:
    """AIMET's search on 16 bits takes minutes for a small embedding; min-max is as good there."""
    sim = decoder_sim(gpt2())
    linear = sim.model.lm_head
    linear.param_quantizers["weight"] = QuantizeDequantize((len(linear.weight), 1), bits, True)
    half = 2 ** (bits - 2)  # of the grid: min-max would take it for the whole
    linear.weight.data.copy_(0.125 * torch.randint(-half, half + 1, linear.weight.shape))
    found, search = [], weights.base._decompose_prequantized_tensor

    def seen(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(weight is linear.weight)
        return search(weight, *args, **kwargs)

    monkeypatch.setattr(weights.base, "_decompose_prequantized_tensor", seen)
    set_ranges(sim, batches())
    assert any(found) == (bits <= 8)
    largest = linear.weight.abs().amax(1, keepdim=True)
    wanted = torch.full_like(largest, 0.125) if bits <= 8 else largest / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(linear.param_quantizers["weight"].get_scale(), wanted)
    sim.compute_encodings(lambda model: model(batches()[0]))
    assert any(found)  # AIMET's own is as it was
