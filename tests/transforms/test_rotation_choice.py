"""The choice of a rotation: what quantizing does to the whole model either way."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import gpt2, llama, simulate, tokens
from torch.testing import assert_close

from aimet_quadapter import (
    SimError,
    UnsupportedModelError,
    choose_rotation,
    prepare,
    rotate,
    set_norm_weight_bits,
    set_table_bits,
)
from aimet_quadapter.transforms import rotation_choice

IDS = [tokens(1, 32, seed) for seed in range(5)]


def maker(weights: int, activations: int) -> Any:
    """What makes a sim of these bits, norms' weights at as many as activations, tables at 16."""

    def make_sim(model: Any) -> Any:
        settings = {"default_param_bw": weights, "default_output_bw": activations}
        sim = simulate(model, in_place=True, **settings)
        set_norm_weight_bits(sim, activations)
        set_table_bits(sim, 16)
        return sim

    return make_sim


def loud(model: Any) -> Any:
    """A channel of the stream is fifty times as large, and its norms' weights make up for it."""
    with torch.no_grad():
        model.part("embed").weight[:, 3] *= 50
        model.part("final_norm").weight[3] /= 50
        for block in model.part("blocks"):
            for norm, _ in block.readers():
                block.part(norm).weight[3] /= 50
    return model


@pytest.mark.parametrize(
    ("bits", "wins"), [((16, 8), "hadamard"), ((4, 16), "none")], ids=["W16A8", "W4A16"]
)
def test_outliers_are_turned_away_where_activations_are_coarse_and_not_where_weights_are(
    bits: tuple[int, int], wins: str
) -> None:
    model = loud(prepare(llama()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(IDS[0])
    found = choose_rotation(model, IDS, maker(*bits))
    assert found.kind == wins, found
    assert set(found.losses) == {"none", "hadamard"}
    assert min(found.losses, key=lambda kind: found.losses[kind]) == wins
    assert f"{found.losses[wins]:.4f}  chosen" in str(found)
    assert bool(model.rotation) is (wins != "none")
    assert_close(model(IDS[0]), logits, rtol=1e-4, atol=1e-4)
    if wins == "none":
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    else:
        other = loud(prepare(llama()))
        rotate(other)
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
        )


def test_ranges_are_set_on_other_samples_than_those_compared_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    end_loss, set_ranges = rotation_choice.EndLoss, rotation_choice.set_ranges

    def compare(model: Any, samples: Any) -> Any:
        seen["compared"] = [x for sample in samples for x in sample.tensors()]
        return end_loss(model, samples)

    def fit(sim: Any, samples: Any) -> None:
        seen["ranges"] = [x for sample in samples for x in sample.tensors()]
        set_ranges(sim, samples)

    monkeypatch.setattr(rotation_choice, "EndLoss", compare)
    monkeypatch.setattr(rotation_choice, "set_ranges", fit)
    choose_rotation(prepare(llama()), IDS, maker(8, 8))
    assert [x.tolist() for x in seen["ranges"]] == [x.tolist() for x in IDS[:2]]
    assert [x.tolist() for x in seen["compared"]] == [IDS[-1].tolist()]


def test_what_cannot_be_turned_is_refused_before_a_sim_is_made() -> None:
    def never(model: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match="kind is 'dct'"):
        choose_rotation(prepare(llama()), IDS, never, kind="dct")
    with pytest.raises(UnsupportedModelError, match="only a prepared model"):
        choose_rotation(llama(), IDS, never)
    with pytest.raises(UnsupportedModelError, match="is a sim's"):
        choose_rotation(simulate(prepare(gpt2())).model, IDS, never)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_it_was_on_any_exception(stop: type[BaseException]) -> None:
    model = prepare(llama())
    before = copy.deepcopy(model.state_dict())
    sims: list[Any] = []

    def make_sim(tried: Any) -> Any:
        if sims:
            raise stop
        sims.append(maker(8, 8)(tried))
        return sims[0]

    with pytest.raises(stop):
        choose_rotation(model, IDS, make_sim)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not model.rotation
    model.part("final_norm").weight.data[0] = float("nan")
    with pytest.raises(SimError, match="norm"):
        choose_rotation(model, IDS, maker(8, 8))


def test_a_model_in_bf16_is_compared_as_its_sim_computes() -> None:
    model = prepare(llama().bfloat16())
    found = choose_rotation(model, IDS, maker(8, 8))
    assert all(0 < loss < float("inf") for loss in found.losses.values())
    assert model.part("head").weight.dtype == torch.bfloat16


def test_one_sim_is_gone_before_the_next_is_made() -> None:
    sims: list[Any] = []

    def make_sim(model: Any) -> Any:
        assert all(earlier() is None for earlier in sims)
        sim = maker(8, 8)(model)
        sims.append(weakref.ref(sim.model))
        return sim

    gc.disable()
    try:
        choose_rotation(prepare(llama()), IDS, make_sim)
        assert [model() for model in sims] == [None, None]
    finally:
        gc.enable()
