from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from aimet_torch.nn.modules import custom
from tiny import decoder_sim, gpt2, llama, make_sim, tokens
from torch import Tensor, nn

from aimet_quadapter import CoverageError, SimError, find_pairs, prepare
from aimet_quadapter.encodings.coverage_table import Coverage, coverage, keep_module_sites

CASES = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def rows(table: Coverage) -> dict[str, Any]:
    return {r.name: r for r in table.rows}


def missing(table: Coverage) -> list[str]:
    return [r.name for r in table.missing]


@pytest.mark.parametrize("config_file", ["default", "htp_v66", "htp_v73", "htp_v81"])
def test_a_prepared_model_lacks_nothing(make: Any, config_file: str) -> None:
    sim = decoder_sim(make(1), calibrated=True, config_file=config_file)
    table = coverage(sim, strict=True)
    assert not table.missing
    assert not table.without_range
    assert "0 lack an encoding" in table.summary()
    for name, module in sim.model.named_modules():
        if isinstance(module, nn.Linear):
            row = rows(table)[name]
            assert [e.bits for e in (*row.inputs, *row.outputs, row.parameters["weight"])] == [
                8
            ] * 3


def test_a_prepared_model_lacks_nothing_with_a_mask_of_its_own(make: Any) -> None:
    """As it is exported for a device: ids, float mask and positions are inputs."""
    length = 6
    inputs = (tokens(1, length), torch.full((length, length), -50.0).triu(1)[None, None])
    inputs = (*inputs, torch.arange(length)[None])
    sim = make_sim(prepare(make(1)), *inputs)
    assert missing(coverage(sim, inputs, strict=True)) == []


def test_quantizers_without_a_range_are_told_apart(make: Any) -> None:
    table = coverage(decoder_sim(make(1)), strict=True)
    assert not table.missing
    assert len(table.without_range) > 10
    assert "without range" in str(table)


def test_per_channel_and_bits_are_told() -> None:
    sim = decoder_sim(gpt2(1), calibrated=True, default_param_bw=4, default_output_bw=16)
    row = rows(coverage(sim))["transformer.h.0.mlp.c_fc"]
    weight = row.parameters["weight"]
    assert (weight.bits, weight.symmetric, weight.channels, weight.ready) == (4, True, 128, True)
    assert row.outputs[0].bits == 16
    assert row.outputs[0].channels == 1
    assert "weight:s4×128" in " ".join(row.cells())


def test_what_needs_no_encoding_says_why(make: Any) -> None:
    table = coverage(decoder_sim(make(1), calibrated=True))
    notes = {r.name: r.note for r in table.rows}
    assert "constant" in notes["arange"]
    assert "moves data" in notes["transpose"]
    embedding = next(r for r in table.rows if r.operation == "Embedding")
    assert "gathers" in embedding.note
    assert embedding.outputs == (embedding.parameters["weight"],)


def test_the_table_has_a_line_for_each_operation(make: Any) -> None:
    table = coverage(decoder_sim(make(1), calibrated=True))
    lines = str(table).splitlines()
    assert lines[0].split()[:2] == ["operation", "type"]
    assert len(lines) == len(table.rows) + 3
    assert all(r.name in line for r, line in zip(table.rows, lines[1:], strict=False))


class Block(nn.Module):
    """Attention and a residual as most models write them: in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = torch.matmul(self.q(h), self.k(h).transpose(1, 2))
        y = torch.matmul(F.softmax(scores, dim=-1), self.v(h))
        y = self.act(self.o(y))
        return x + y


def test_functions_outside_modules_are_listed() -> None:
    x = torch.randn(2, 4, 8)
    sim = make_sim(Block(), x)
    sim.compute_encodings(lambda m: m(x))
    table = coverage(sim)
    assert missing(table) == ["matmul", "softmax", "matmul", "add"]
    assert all("function outside a module" in r.note for r in table.missing)
    assert rows(table)["o"].note == "one operation with act, which carries the encoding"
    with pytest.raises(CoverageError, match="softmax") as e:
        coverage(sim, strict=True)
    text = str(e.value)
    assert text.startswith("4 operations")
    assert "prepare(model)" in text


def test_a_quantizer_that_was_removed_is_found(make: Any) -> None:
    sim = decoder_sim(make(1), calibrated=True)
    ends = ("mlp.down_proj", "mlp.c_proj")
    name = next(n for n, _ in sim.model.named_modules() if n.endswith(ends))
    linear = sim.model.get_submodule(name)
    output, weight = linear.output_quantizers[0], linear.param_quantizers["weight"]
    linear.output_quantizers[0] = None
    assert missing(coverage(sim)) == [name]
    assert "output quantizer is off" in coverage(sim).missing[0].note
    linear.output_quantizers[0] = output
    linear.param_quantizers["weight"] = None
    assert missing(coverage(sim)) == [name]
    assert "weight" in coverage(sim).missing[0].note
    linear.param_quantizers["weight"] = weight
    assert missing(coverage(sim)) == []


def test_a_constant_without_encoding_is_found(make: Any) -> None:
    sim = decoder_sim(make(1), calibrated=True)
    name = next(n for n, _ in sim.model.named_modules() if n.endswith("attention.scale_scores"))
    sim.model.get_submodule(name).input_quantizers[1] = None
    (row,) = coverage(sim).missing
    assert row.name == name
    assert "constant" in row.note


def test_the_models_input_needs_one() -> None:
    x = torch.randn(3, 4)
    sim = make_sim(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x)
    assert missing(coverage(sim)) == []
    sim.model[0].input_quantizers[0] = None
    assert missing(coverage(sim)) == ["0"]


class Joined(nn.Module):
    def __init__(self, join: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        parts = self.a(x), self.b(x)
        y = self.join(*parts) if self.join else torch.cat(parts, dim=1)
        return self.c(y)


def test_what_joins_different_encodings_needs_one_of_its_own() -> None:
    x = torch.randn(3, 4)
    sim = make_sim(Joined(custom.Concat(1)), x)
    assert missing(coverage(sim)) == []
    sim = make_sim(Joined(None), x)
    sim.model.c.input_quantizers[0] = None
    (row,) = coverage(sim).missing
    assert row.name == "cat"
    assert "different encodings" in row.note


def test_a_norm_that_folds_into_its_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    sim = make_sim(torchvision.models.mobilenet_v2(num_classes=3), x)
    table = coverage(sim)
    norm = next(r for r in table.rows if r.operation == "BatchNorm2d")
    assert "folds into" in norm.note
    assert set(missing(table)) == {"add", "adaptive_avg_pool2d"}


def test_what_is_no_sim_is_refused() -> None:
    with pytest.raises(SimError, match="Linear"):
        coverage(nn.Linear(2, 2))
    with pytest.raises(SimError, match="Linear"):
        keep_module_sites(nn.Linear(2, 2))


SITES = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU)


def test_only_aimets_own_sites_are_kept(make: Any) -> None:
    sim = decoder_sim(make(2), calibrated=True)
    off = keep_module_sites(sim)
    for name, module in sim.named_qmodules():
        on = any(q is not None for q in (*module.input_quantizers, *module.output_quantizers))
        if isinstance(module, nn.Embedding):
            assert module.param_quantizers["weight"] is not None
        elif isinstance(module, SITES) or name.endswith((".act.mul", ".mlp.mul")):
            assert on, name
            assert name not in off
        else:
            assert not on, name
            assert name in off
    ends = {n.rsplit(".", 1)[-1] for n in off}
    assert ends >= {"qk", "scale_scores", "add_mask", "softmax", "av", "add_attn", "add_mlp"}
    assert sim.model(tokens()).isfinite().all()
    assert len(find_pairs(sim, kinds=sim.model.default_kinds)) > 0
    assert set(missing(coverage(sim))) <= set(off)
    assert keep_module_sites(sim) == []


def test_some_sites_can_be_kept(make: Any) -> None:
    sim = decoder_sim(make(1), calibrated=True)
    off = keep_module_sites(sim, keep=["*.softmax", "*.add_*"])
    assert not [n for n in off if n.endswith("softmax") or ".add_" in n]
    assert [n for n in off if n.endswith(".qk")]


def test_sites_of_a_model_that_was_not_prepared_are_left() -> None:
    x = torch.randn(2, 4, 8)
    assert keep_module_sites(make_sim(Block(), x)) == []
