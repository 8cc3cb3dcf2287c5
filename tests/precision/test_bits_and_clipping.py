"""`assign_bits` and `choose_ranges` where a token has a massive activation; the residual's bits."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantization.affine import QuantizeDequantize
from tiny import assert_same, batches, copied, decoder_sim, gpt2, llama, make_sim, state

from aimet_quadapter import (
    DataError,
    SimError,
    assign_bits,
    choose_ranges,
    export,
    keep_module_sites,
    prepare,
    set_norm_weight_bits,
    set_ranges,
    set_residual_bits,
    set_table_bits,
)
from aimet_quadapter.sim import sites
from aimet_quadapter.sim.sites import Seen, Trials

MASSIVE = "transformer.h.0.mlp.c_proj"
TOKEN = 5


def data() -> list[torch.Tensor]:
    """Token ids that begin with the token of the massive activation."""
    return [torch.cat((torch.full((2, 1), TOKEN), batch), 1) for batch in batches()]


@copied
def massive_sim(ranges: bool = True) -> QuantizationSimModel:
    """W16A8 of a GPT-2 at AIMET's own sites; its first MLP writes 1000 and more at one token."""
    model = gpt2()
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        model.transformer.wte.weight[TOKEN, 3] = 30.0
        mlp.c_fc.weight[:, 0] = 0.0
        mlp.c_fc.weight[3, 0] = 10.0  # the norm's output on channel 3 is above 4 at TOKEN alone
        mlp.c_fc.bias[0] = -40.0
        mlp.c_proj.weight[0, 7] = 200.0
    prepared = prepare(model)
    sim = QuantizationSimModel(
        prepared, prepared.dummy_input(), config_file="default", default_param_bw=16
    )
    keep_module_sites(sim)
    if ranges:
        set_ranges(sim, data())
    return sim


def bits(sim: QuantizationSimModel) -> dict[str, int]:
    """Name of every quantizer → its bits."""
    return {name: q.bitwidth for name, q in sim.named_quantizers()}


def measure(sim: QuantizationSimModel) -> float:
    """KL from the unquantized model, on the samples that the choices were made on."""
    return Trials(sim, data(), "distillation").loss()


def test_the_site_of_the_massive_activation_gets_the_bits() -> None:
    sim = massive_sim()
    before, widths = measure(sim), bits(sim)
    result = assign_bits(sim, data(), 1, loss="distillation", min_gain=0)
    assert [choice.site for choice in result.choices] == [MASSIVE]
    (changed,) = {name for name, width in bits(sim).items() if width != widths[name]}
    assert changed.startswith(MASSIVE)
    assert bits(sim)[changed] == 16
    assert result.loss == pytest.approx(before)
    assert result.choices[0].loss == pytest.approx(measure(sim))
    assert measure(sim) < 0.5 * before
    gains = [before - loss for loss in result.tried.values()]
    assert result.choices[0].gain == pytest.approx(max(gains))
    assert f"{MASSIVE}" in str(result)


def test_each_further_site_lowers_the_loss_and_the_budget_is_kept() -> None:
    result = assign_bits(massive_sim(), data(), 3, loss="distillation", min_gain=0)
    losses = [result.loss, *(choice.loss for choice in result.choices)]
    assert len(result.choices) == 3
    assert losses == sorted(losses, reverse=True)
    assert len({choice.site for choice in result.choices}) == 3


@pytest.mark.parametrize("choose", [lambda *a, **k: assign_bits(*a, 2, **k), choose_ranges])
def test_nothing_is_changed_that_brings_too_little(choose) -> None:
    sim = massive_sim()
    before, widths = state(sim), bits(sim)
    result = choose(sim, data(), min_gain=100.0)
    assert_same(sim, before)
    assert bits(sim) == widths
    assert all(choice.range == choice.was for choice in getattr(result, "choices", ()))


def test_a_range_is_clipped_where_that_lowers_the_loss() -> None:
    sim = massive_sim()
    before = measure(sim)
    result = choose_ranges(sim, data(), loss="distillation", min_gain=0)
    of = {choice.site: choice for choice in result.choices}
    assert of[MASSIVE].was[1] > 1000
    assert of[MASSIVE].range[1] <= 500
    assert measure(sim) == pytest.approx(result.choices[-1].loss)
    assert measure(sim) < 0.9 * before
    for choice in result.choices:
        assert choice.loss <= choice.before
        assert (choice.range == choice.was) == (min(choice.tried.values()) >= choice.before)


def test_a_range_is_left_where_clipping_ruins_the_model() -> None:
    """One logit in a hundred is large: without it the model says something else."""
    sim = massive_sim()
    with torch.no_grad():
        sim.model.lm_head.weight[7] *= 100
    set_ranges(sim, data())
    before = state(sim)
    result = choose_ranges(sim, data(), sites=["lm_head"], loss="distillation", min_gain=0)
    assert_same(sim, before)
    for choice in result.choices:
        assert min(choice.tried.values()) > choice.before


def test_one_goes_on_where_the_other_ended() -> None:
    sim = massive_sim()
    before = measure(sim)
    first = assign_bits(sim, data(), 1, loss="distillation", min_gain=0)
    second = choose_ranges(sim, data(), loss="distillation", min_gain=0)
    assert second.loss == pytest.approx(first.choices[0].loss)
    after = measure(sim)  # the same number, measured again, where no range was clipped
    assert after == pytest.approx(first.choices[0].loss) or after < first.choices[0].loss
    assert first.choices[0].loss < before


@pytest.mark.parametrize("choose", [lambda *a, **k: assign_bits(*a, 2, **k), choose_ranges])
def test_the_sim_is_as_it_was_after_an_interruption(choose, monkeypatch) -> None:
    sim = massive_sim()
    before, widths = state(sim), bits(sim)
    real, calls = Trials.loss, []

    def interrupted(self) -> float:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trials, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose(sim, data(), loss="distillation", min_gain=-1)
    assert_same(sim, before)
    assert bits(sim) == widths


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation"])
@pytest.mark.parametrize("choose", [lambda *a, **k: assign_bits(*a, 2, **k), choose_ranges])
def test_a_search_finds_the_same_with_weights_quantized_once(choose, loss, monkeypatch) -> None:
    calls: list[int] = []
    forward = QuantizeDequantize.forward

    def counted(self: QuantizeDequantize, x: torch.Tensor) -> torch.Tensor:
        calls.append(id(self))
        return forward(self, x)

    monkeypatch.setattr(QuantizeDequantize, "forward", counted)

    def run() -> tuple[Any, float]:
        """The result, and how often a weight was quantized."""
        sim = massive_sim()
        calls.clear()
        result = choose(sim, data(), candidates=4, loss=loss, min_gain=-1)
        weights = {id(q) for name, q in sim.named_quantizers() if "param_quantizers" in name}
        return result, sum(found in weights for found in calls) / len(weights)

    once, few = run()
    monkeypatch.setattr(sites, "quantized_once", lambda *_: nullcontext())
    each_time, many = run()
    assert once == each_time
    assert once.choices
    samples = sum(len(batch) for batch in data())
    assert few == samples + 1  # in the pass that looks at the sites, then once
    assert many >= 3 * samples


def test_the_export_carries_the_bits_that_were_assigned(tmp_path) -> None:
    sim = massive_sim()
    assign_bits(sim, data(), 1, loss="distillation", min_gain=0)
    folder = export(sim, data()[0][:1], tmp_path / "out", strict=False)
    found = json.loads((folder / "model.encodings").read_text())["activation_encodings"]
    wide = [e["name"] for e in found if e["bw"] == 16 and "embedding" not in e["name"]]
    assert len(wide) == 1
    assert (
        json.loads((folder / "manifest.json").read_text())["quantizers"]["output"]["16 bits"] == 1
    )


def test_a_row_counts_the_same_however_small_it_is() -> None:
    seen = Seen()
    x = torch.tensor([[1000.0, 0.0], [0.1, 0.2], [0.0, 0.0]])
    seen(None, (x,), torch.tensor([[1000.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert seen.error == pytest.approx(1 / 3)
    assert seen.range == (0.0, 1000.0)
    assert seen.magnitude(0.5) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"bits": 4}, "bits is 4"),
        ({"candidates": 0}, "candidates is 0"),
        ({"loss": "mse"}, "loss is 'mse'; known are 'cross-entropy', 'distillation'"),
    ],
)
def test_settings_that_are_not_possible_are_refused(change, message) -> None:
    settings = {"budget": 1} | change
    with pytest.raises(ValueError, match=message):
        assign_bits(massive_sim(), data(), **settings)


def test_what_cannot_be_tried_is_refused() -> None:
    sim = massive_sim()
    with pytest.raises(DataError, match=r"no activation quantizer that is on fits nothing\.\*"):
        choose_ranges(sim, data(), sites=["nothing.*"])
    with pytest.raises(DataError, match="no samples"):
        assign_bits(sim, [], 1)
    with pytest.raises(SimError, match="has no range yet"):
        assign_bits(massive_sim(ranges=False), data(), 1)
    with pytest.raises(SimError, match="QuantizationSimModel"):
        choose_ranges(sim.model, data())


def residual_of_gpt2(layer: str) -> list[str]:
    return [f"{layer}.{name}" for name in ("attn.c_proj", "add_attn", "mlp.c_proj", "add_mlp")]


def residual_of_llama(layer: str) -> list[str]:
    names = ("self_attn.o_proj", "add_attn", "mlp.down_proj", "add_mlp")
    return [f"{layer}.{name}" for name in names]


RESIDUAL = {
    "gpt2": (
        gpt2,
        ["transformer.add_embeddings"]
        + [n for i in range(2) for n in residual_of_gpt2(f"transformer.h.{i}")],
    ),
    "llama": (llama, [n for i in range(2) for n in residual_of_llama(f"model.layers.{i}")]),
}


def outputs(sim: QuantizationSimModel) -> dict[str, Any]:
    return {n: q for n, q in sim.named_quantizers() if "output" in n}


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_residual_stream_gets_its_bits_and_nothing_else_does(name: str) -> None:
    make, expected = RESIDUAL[name]
    sim = decoder_sim(make(), config_file="htp_v73", calibrated=True)
    widths, ranges = bits(sim), {n: float(q.get_max()) for n, q in outputs(sim).items()}
    assert sorted(set_residual_bits(sim)) == sorted(expected)
    changed = {n for n, width in bits(sim).items() if width != widths[n]}
    assert changed == {f"{n}.output_quantizers.0" for n in expected}
    assert {bits(sim)[n] for n in changed} == {16}
    assert {n: float(q.get_max()) for n, q in outputs(sim).items()} == pytest.approx(ranges, 0.01)
    set_residual_bits(sim, 8)
    assert bits(sim) == widths


@pytest.mark.parametrize("name", RESIDUAL)
def test_tables_and_norms_get_their_bits_and_no_other_weight_does(name: str) -> None:
    sim = decoder_sim(RESIDUAL[name][0](), config_file="default", default_param_bw=4)
    widths = bits(sim)
    for change, wide, wanted in [
        (set_table_bits, 8, ("wte", "wpe", "embed_tokens", "lm_head")),
        (set_norm_weight_bits, 16, ("ln_1", "ln_2", "ln_f", "layernorm", "model.norm")),
    ]:
        expected = {n for n in weights(sim) if n.endswith(wanted)}
        assert set(change(sim)) == expected != set()
        changed = {n for n, width in bits(sim).items() if width != widths[n]}
        assert changed == {f"{n}.param_quantizers.weight" for n in expected}
        assert {bits(sim)[n] for n in changed} == {wide}
        change(sim, 4)
        assert bits(sim) == widths
    with pytest.raises(ValueError, match="bits is 2"):
        set_table_bits(sim, 2)


def weights(sim: QuantizationSimModel) -> list[str]:
    return [n for n, m in sim.named_qmodules() if "weight" in m.param_quantizers]


def test_at_aimets_own_sites_the_sums_stay_off() -> None:
    sim = massive_sim()
    assert set(set_residual_bits(sim)) == {n for n in RESIDUAL["gpt2"][1] if n.endswith("c_proj")}
    assert sim.model.transformer.h[0].add_mlp.output_quantizers[0] is None


def test_a_residual_stream_that_nobody_knows_and_bits_that_cannot_be_are_refused() -> None:
    sim = make_sim(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.zeros(1, 4))
    with pytest.raises(SimError, match=r"Sequential.*prepare"):
        set_residual_bits(sim)
    sim = massive_sim()
    before = bits(sim)
    with pytest.raises(ValueError, match="bits is 3"):
        set_residual_bits(sim, 3)
    with pytest.raises(SimError):
        set_residual_bits(sim.model)
    assert bits(sim) == before
