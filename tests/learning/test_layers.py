"""All pairs inside a layer learn together, on the error of the layer's output."""

from __future__ import annotations

import logging
import sys
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

from aimet_quadapter import (
    DataError,
    LogitsOnly,
    analytic_alphas,
    calibrate,
    find_pairs,
    set_prefix,
    set_ranges,
)
from aimet_quadapter.config import STARTS
from aimet_quadapter.learning import layer_error
from aimet_quadapter.learning.layer_error import LayerError
from aimet_quadapter.learning.layers import (
    Passed,
    capture_layers,
    layers_of,
    passed_on,
    take_up,
)
from aimet_quadapter.sim.ranges import dynamic, placeholders
from aimet_quadapter.sim.samples import as_samples

LAYERS = replace(FAST, objective="layer", choice="block", steps=60, decay_every=20)
"""Each layer's best α, whatever the whole model makes of it."""


def captured(sim, samples, budget=1 << 30):
    pairs = find_pairs(sim)
    layers = layers_of(sim.model, pairs)
    groups = list(capture_layers(sim, layers, as_samples(samples, sim.model), budget))
    return groups, pairs


@pytest.mark.parametrize("build", [gpt2, llama])
def test_layer_errors_fall_below_every_start_and_below_blocks(build):
    sim = simulate(build(), "htp_v73", default_param_bw=4)
    pairs = find_pairs(sim)
    before = state(sim)
    longer = replace(LAYERS, steps=120, decay_every=40)  # after 60 they are on a par with blocks
    result = calibrate(sim, batches(), pairs, longer)
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
        error = LayerError(layer, longer)
        of = [torch.cat([c.alphas[p.name] for p in layer.pairs]) for c in (result, blocks)]
        assert error.on_held_back(of[0])[0] < error.on_held_back(of[1])[0]


def test_the_layers_of_a_stock_model_are_found_too():
    sim = make_sim(LogitsOnly(stock_llama()), batches()[0])
    pairs = find_pairs(sim, samples=batches())
    layers = layers_of(sim.model, pairs)
    assert list(layers) == ["model.model.layers.0", "model.model.layers.1"]
    (captured_layers,) = capture_layers(sim, layers, as_samples(batches(), sim.model), 1 << 30)
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
    assert "blocks.1 are calibrated one by one: called again it gives other values" in caplog.text
    assert "blocks.0" not in caplog.text
    for start in STARTS:  # the errors of blocks and of a layer
        assert result.results[1].losses[start] == alone.results[1].losses[start]
        assert result.results[0].losses[start] != alone.results[0].losses[start]


def test_layers_of_many_groups_go_through_the_model_once():
    sim = simulate(llama(3))
    pairs = find_pairs(sim)
    first = sim.model.get_submodule("model.layers.0.input_layernorm")

    def calls(budget: int) -> int:
        seen = []
        handle = first.register_forward_hook(lambda *_: seen.append(1))
        few = replace(LAYERS, steps=0, capture_bytes=budget)
        calibrate(sim, batches(), pairs, few)
        handle.remove()
        return len(seen)

    assert calls(1) == calls(1 << 30)


def test_groups_hold_what_one_holds():
    sim = entries(InPlace, InPlace, InPlace)
    (together,) = captured(sim, [rows()])[0]
    alone = [layer for (layer,) in captured(sim, [rows()], budget=1)[0]]
    assert [layer.name for layer in alone] == [layer.name for layer in together]
    for one, other in zip(alone, together, strict=True):
        assert len(one.inputs) == 2
        assert all(map(torch.equal, one.inputs, other.inputs))


def test_a_layer_that_runs_twice_is_none(caplog):
    sim = make_sim(Stack(), rows())
    layers = layers_of(sim.model, find_pairs(sim, samples=[rows()]))
    assert list(layers) == ["blocks.0", "blocks.1"]
    sim.model.twice = True
    with caplog.at_level(logging.WARNING):
        groups = list(capture_layers(sim, layers, as_samples([rows()], sim.model), 1 << 20))
    assert [layer.name for group in groups for layer in group] == ["blocks.1"]
    assert "blocks.0 are calibrated one by one: a sample calls it 2 times" in caplog.text


class InPlace(nn.Module):
    """Adds to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x += self.b(self.a(x).relu())
        return x


class Entries(nn.Module):
    """Modules one after the other; `again` says how often one runs that does not run once."""

    def __init__(self, *entries: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(entries)
        self.again: dict[int, int] = {}

    def forward(self, x):
        x = x.clone()
        for i in range(len(self.blocks)):
            for _ in range(self.again.get(i, 1)):
                x = self.blocks[i](x)
        return x


def entries(*modules):
    torch.manual_seed(0)
    return make_sim(Entries(*(module() for module in modules)), rows())


def test_a_layer_that_works_in_place_is_learned():
    sim = entries(InPlace, InPlace)
    (layers,) = captured(sim, [rows()])[0]
    assert len(layers) == 2
    before = [x.clone() for layer in layers for x in layer.inputs]
    result = calibrate(sim, [rows()], find_pairs(sim, samples=[rows()]), LAYERS)
    for layer in layers:
        LayerError(layer, LAYERS).on_held_back(torch.ones(16))
    after = [x for layer in layers for x in layer.inputs]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(r.loss < r.losses["ones"] for r in result.results)


def test_a_layer_that_raises_when_it_is_called_again_is_left_out(caplog):
    sim = entries(InPlace, InPlace)
    pairs = find_pairs(sim, samples=[rows()])
    layers, samples = layers_of(sim.model, pairs), as_samples([rows()], sim.model)
    left = iter(range(len(samples)))  # each is recorded once
    sim.model.blocks[0].register_forward_pre_hook(lambda module, args: (next(left), None)[1])
    with caplog.at_level(logging.WARNING):
        (group,) = capture_layers(sim, layers, samples, 1 << 20)
    assert [layer.name for layer in group] == ["blocks.1"]
    assert "blocks.0 are calibrated one by one: called again it raises StopIteration" in caplog.text


def test_calls_are_counted_by_sample(caplog):
    sim = entries(InPlace, InPlace)
    layers = layers_of(sim.model, find_pairs(sim, samples=[rows()]))
    samples = as_samples([rows()], sim.model)
    assert len(samples) == 2
    times = iter([2, 0])
    sim.model.register_forward_pre_hook(lambda model, args: model.again.update({0: next(times, 1)}))
    with caplog.at_level(logging.WARNING):
        (group,) = capture_layers(sim, layers, samples, 1 << 20)
    assert [layer.name for layer in group] == ["blocks.1"]
    assert "blocks.0" in caplog.text


def test_an_empty_tensor_passes_a_dynamic_range():
    sim = entries(InPlace)
    sim.compute_encodings(lambda model: model(rows()))
    with dynamic(list(sim.quantizers())):
        assert sim.model(rows()[:, :0]).shape == (2, 0, 8)


def test_ranges_do_not_make_a_layer_be_learned_again(tmp_path, monkeypatch):
    module = sys.modules["aimet_quadapter.learning.calibration"]
    sim = simulate(llama())
    pairs = find_pairs(sim)
    calibrate(sim, batches(), pairs, LAYERS, tmp_path)
    set_ranges(sim, batches())
    monkeypatch.setattr(module.Learner, "learn", lambda self: pytest.fail("learned again"))
    calibrate(sim, batches(), pairs, LAYERS, tmp_path)


def test_one_massive_token_does_not_decide():
    """The first token of a text may have values thousands of times as large as all others."""
    sim = simulate(llama())
    (layers,) = captured(sim, batches())[0]
    error = LayerError(layers[0], LAYERS)
    error.targets[0][0] *= 1e4
    massive = layer_error._power(error.targets[0])
    assert torch.allclose(massive[1:], error.targets[0][1:].square().sum(1), rtol=1e-5)


class Convolutions(nn.Module):
    """Convolution → ReLU → convolution → ReLU in each entry: an output may be zero."""

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


def test_an_image_counts_as_one_row_and_may_be_zero():
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    sim = make_sim(Convolutions(), x)
    (layers,) = captured(sim, [x])[0]
    error = LayerError(layers[0], LAYERS)
    assert [y.shape for y in error.targets] == [(1, 100), (1, 100)]
    assert 0 < error.on_held_back(torch.ones(6))[0] < 1e-2
    sim.model.stages[1][2].bias.data.fill_(-9.0)
    (layers,) = captured(sim, [x])[0]
    assert LayerError(layers[1], LAYERS).on_held_back(torch.ones(6))[0] == 0


def test_samples_on_another_way_than_the_pairs_are_refused():
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})]
            )
            self.bent = False

        def forward(self, x):
            y = self.blocks[0]["a"](x)
            return self.blocks[0]["b"](y.sigmoid() if self.bent else y.relu())

    sim = make_sim(Ways(), rows())
    pairs = find_pairs(sim, samples=[rows()])
    assert len(pairs) == 1
    sim.model.bent = True
    for config in (LAYERS, BLOCKS):
        with pytest.raises(DataError, match="take another way"):
            calibrate(sim, [rows()], pairs, config)
    with pytest.raises(DataError, match="take another way"):
        analytic_alphas(sim, [rows()], pairs, "cle")


def test_an_output_that_is_not_finite_is_refused():
    sim = simulate(llama())
    (layers,) = captured(sim, batches())[0]
    layer = layers[0]
    call = layer.calls[0]
    layer.calls[0] = call._replace(args=(call.args[0] * float("inf"), *call.args[1:]))
    with pytest.raises(DataError, match=r"layers\.0 holds NaN or inf"):
        LayerError(layer, LAYERS)


QUANTIZED = replace(LAYERS, inputs="quantized")


def test_a_layer_reads_what_the_quantized_ones_before_it_give() -> None:
    sim = simulate(llama(), "htp_v73", default_param_bw=4)
    (layers,), pairs = captured(sim, batches())
    first, second = layers
    results = {r.pair.name: r.alpha for r in calibrate(sim, batches(), pairs, QUANTIZED).results}
    alphas = {p.name: results[p.name] for p in first.pairs}
    plain = [call.args[0] for call in second.calls]
    with placeholders(sim.quantizers()):  # as in `calibrate`: else the first call sets ranges
        passed = passed_on(first, alphas)
        take_up(second, passed)
        with torch.no_grad(), first.quantized():
            given = [first(call, alphas) for call in first.calls]
    for call, before, expected in zip(second.quantized_calls, plain, given, strict=True):
        assert torch.equal(call.args[0], expected)
        assert not torch.equal(call.args[0], before)
    assert all(torch.equal(c.args[0], x) for c, x in zip(second.calls, plain, strict=True))
    error = LayerError(second, QUANTIZED)
    with torch.no_grad(), remove_all_quantizers(sim.model):
        wanted = [second(call).flatten(0, 1) for call in second.calls]
    assert all(torch.equal(y, w) for y, w in zip(error.targets, wanted, strict=True))
    ones = torch.ones(sum(p.channels for p in second.pairs))
    loss, _ = error.on_held_back(ones)
    second.quantized_calls = second.calls
    assert loss != error.on_held_back(ones)[0]


def test_on_quantized_inputs_the_first_layer_learns_the_same_and_the_next_another() -> None:
    sim = simulate(llama(), "htp_v73", default_param_bw=4)
    pairs = find_pairs(sim)
    before = state(sim)
    both = [calibrate(sim, batches(), pairs, config).alphas for config in (LAYERS, QUANTIZED)]
    assert_same(sim, before)
    for pair in pairs:
        same_alpha = torch.equal(*(alphas[pair.name] for alphas in both))
        assert same_alpha == (".1." not in pair.name), pair.name


def test_on_quantized_inputs_an_interrupted_run_goes_on_with_the_same_bits(tmp_path) -> None:
    sim = simulate(llama(), "htp_v73", default_param_bw=4)
    pairs = find_pairs(sim)
    whole = calibrate(sim, batches(), pairs, QUANTIZED).alphas
    calibrate(sim, batches(), pairs, QUANTIZED, tmp_path)
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in files[1:]:  # only the first layer was done
        file.unlink()
    again = calibrate(sim, batches(), pairs, QUANTIZED, tmp_path).alphas
    assert all(torch.equal(again[name], alpha) for name, alpha in whole.items())


def test_a_layer_that_reads_something_else_keeps_its_inputs_and_it_is_said(caplog) -> None:
    sim = simulate(llama())
    (layers,), _ = captured(sim, batches())
    first, second = layers
    take_up(second, [Passed(x.unquantized + 1, x.quantized) for x in passed_on(first, {})])
    assert second.quantized_calls is second.calls
    assert "model.layers.1 does not read what the layer before it gives" in caplog.text


def test_quantized_inputs_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs is 'quantized'; expected objective=\"layer\""):
        replace(BLOCKS, inputs="quantized")
    with pytest.raises(ValueError, match="inputs is 'both'; expected one of"):
        replace(LAYERS, inputs="both")
