"""All pairs inside a layer learn together, on the error of the layer's output."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from aimet_torch.utils import remove_all_quantizers
from tiny import BLOCKS, FAST, assert_same, batches, make_sim, simulate, state
from tiny import llama as stock_llama
from tiny import outlier_gpt2 as gpt2
from tiny import outlier_llama as llama
from torch import nn
from torch.testing import assert_close

from aimet_quadapter import DataError, LogitsOnly, calibrate, find_pairs, set_prefix
from aimet_quadapter.config import STARTS
from aimet_quadapter.learning.layer_error import LayerError
from aimet_quadapter.learning.layers import capture_layers, layers_of
from aimet_quadapter.sim.samples import as_samples

LAYERS = replace(FAST, choice="block", steps=60, decay_every=20)
"""Each layer's best α, whatever the whole model makes of it."""


def captured(sim, samples, budget=1 << 30):
    pairs = find_pairs(sim)
    layers = layers_of(sim.model, pairs)
    groups = list(capture_layers(sim.model, layers, as_samples(samples, sim.model), budget))
    return groups, pairs


@pytest.mark.parametrize("build", [gpt2, llama])
def test_layer_errors_fall_below_every_start_and_below_blocks(build):
    sim = simulate(build(), "htp_v73", default_param_bw=4)
    pairs = find_pairs(sim)
    before = state(sim)
    result = calibrate(sim, batches(), pairs, LAYERS)
    assert_same(sim, before)
    assert [r.pair.name for r in result.results] == [p.name for p in pairs]
    assert all((r.alpha > 0).all() and r.loss == min(r.losses.values()) for r in result.results)
    of_pair = {r.pair.name: r for r in result.results}
    blocks = calibrate(sim, batches(), pairs, BLOCKS)
    (layers,) = captured(sim, batches())[0]
    assert len(layers) == 2
    for layer in layers:
        losses = [of_pair[p.name].losses for p in layer.pairs]
        assert len(losses) == 3 + (build is llama)
        assert all(other == losses[0] for other in losses)
        assert losses[0]["learned"] < min(losses[0][start] for start in STARTS)
        error = LayerError(layer, LAYERS)
        of = [torch.cat([c.alphas[p.name] for p in layer.pairs]) for c in (result, blocks)]
        assert error.on_held_back(of[0])[0] < error.on_held_back(of[1])[0]


def test_the_layers_of_a_stock_model_are_found_too():
    sim = make_sim(LogitsOnly(stock_llama()), batches()[0])
    pairs = find_pairs(sim, samples=batches())
    layers = layers_of(sim.model, pairs)
    assert list(layers) == ["model.model.layers.0", "model.model.layers.1"]
    (captured_layers,) = capture_layers(
        sim.model, layers, as_samples(batches(), sim.model), budget=1 << 30
    )
    assert [layer.name for layer in captured_layers] == list(layers)
    result = calibrate(sim, batches(), pairs, LAYERS)
    assert all(r.loss < r.losses["ones"] for r in result.results if r.pair.kind != "norm-head")


def test_the_error_of_a_layer_is_the_mean_share_of_each_token():
    sim = simulate(llama(), "htp_v73")
    (layers,) = captured(sim, batches())[0]
    layer = layers[1]
    error = LayerError(layer, replace(LAYERS, holdout=0.5))
    ones = torch.ones(sum(p.channels for p in layer.pairs))
    wanted = []
    with torch.no_grad():
        for call, held in zip(layer.calls, error._held, strict=True):
            assert 0 < held.sum() < len(held)
            with remove_all_quantizers(sim.model):
                y = layer.module(*call.args, **call.kwargs).flatten(0, 1)
            with layer.quantized():
                got = layer.module(*call.args, **call.kwargs).flatten(0, 1)
            shares = (got - y).norm(dim=1) ** 2 / y.norm(dim=1) ** 2
            wanted.append(shares[held].mean().item())
    assert error.on_held_back(ones)[0] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)


@pytest.mark.parametrize("prefix", [(), (3, 5)])
def test_a_layer_gives_again_what_it_gave_in_the_model(prefix):
    model = llama()
    if prefix:
        set_prefix(model, list(prefix))
    sim = simulate(model)
    samples = as_samples(batches(), sim.model)
    seen = {}
    (layers,) = captured(sim, batches())[0]
    assert len(layers) == 2
    for layer in layers:
        handle = layer.module.register_forward_hook(
            lambda module, args, output, name=layer.name: seen.setdefault(name, []).append(output)
        )
        with torch.no_grad(), remove_all_quantizers(sim.model):
            for sample in samples:
                sample(sim.model)
            handle.remove()
            for call, expected in zip(layer.calls, seen[layer.name], strict=True):
                assert_close(layer(call), expected, rtol=1e-5, atol=1e-5)


def test_a_small_budget_gives_the_same_in_groups():
    sim = simulate(gpt2())
    (whole,) = captured(sim, batches())[0]
    groups = captured(sim, batches(), budget=1)[0]
    assert [len(g) for g in groups] == [1, 1]
    for one, (other,) in zip(whole, groups, strict=True):
        assert one.name == other.name
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


class Stack(nn.Module):
    """Linear → ReLU → linear in each entry; `twice` runs the first one again."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.twice = twice

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x + self.blocks[0](x) if self.twice else x


def rows():
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def test_a_layer_that_cannot_be_run_again_is_learned_block_by_block_and_said_so(caplog):
    sim = make_sim(Stack(), rows())
    pairs = find_pairs(sim, samples=[rows()])
    assert len(pairs) == 2
    alone = calibrate(sim, [rows()], pairs, replace(LAYERS, objective="block"))
    growing = iter(range(1, 100))
    second = sim.model.blocks[1]
    handle = second.register_forward_hook(lambda module, args, output: output * next(growing))
    with caplog.at_level(logging.WARNING):
        result = calibrate(sim, [rows()], pairs, LAYERS)
    handle.remove()
    assert "blocks.1 are calibrated one by one: called again it differs by" in caplog.text
    assert "blocks.0" not in caplog.text
    name = pairs[1].name
    assert torch.equal(result.alphas[name], alone.alphas[name])
    assert not torch.equal(result.alphas[pairs[0].name], alone.alphas[pairs[0].name])


def test_a_layer_that_runs_twice_is_none(caplog):
    sim = make_sim(Stack(), rows())
    layers = layers_of(sim.model, find_pairs(sim, samples=[rows()]))
    assert list(layers) == ["blocks.0", "blocks.1"]
    sim.model.twice = True
    with caplog.at_level(logging.WARNING):
        groups = list(capture_layers(sim.model, layers, as_samples([rows()], sim.model), 1 << 20))
    assert [layer.name for group in groups for layer in group] == ["blocks.1"]
    assert "blocks.0 are calibrated one by one: 2 samples call it 4 times" in caplog.text


class Convolutions(nn.Module):
    """Convolution → ReLU → convolution → ReLU in each entry: an output has zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())
            for _ in range(2)
        )

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_pixels_of_a_convolution_are_tokens_and_may_be_zero():
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    model = Convolutions()
    model.stages[1][2].bias.data -= 0.3
    sim = make_sim(model, x)
    (layers,) = captured(sim, [x])[0]
    error = LayerError(layers[1], LAYERS)
    assert all(y.shape == (25, 4) for y in error.targets)
    assert any((y == 0).all(1).any() for y in error.targets)  # some pixels are zero
    loss, _ = error.on_held_back(torch.ones(6))
    assert 0 < loss < 1e-2


def test_an_output_that_is_not_finite_is_refused():
    sim = simulate(llama())
    (layers,) = captured(sim, batches())[0]
    layer = layers[0]
    call = layer.calls[0]
    layer.calls[0] = call._replace(args=(call.args[0] * float("inf"), *call.args[1:]))
    with pytest.raises(DataError, match=r"layers\.0 holds NaN or inf"):
        LayerError(layer, LAYERS)
