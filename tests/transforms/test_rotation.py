"""A rotated stream: the same logits in every family that can be turned, the others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny import gpt2, llama, simulate, tokens
from torch import nn
from torch.testing import assert_close

from aimet_quadapter import (
    SimError,
    UnsupportedModelError,
    find_pairs,
    prepare,
    rotate,
    save_huggingface,
    set_prefix,
)
from aimet_quadapter.config import ROTATIONS
from aimet_quadapter.transforms import rotation
from aimet_quadapter.transforms.orthogonal import orthogonal

FIXED = {
    "gemma2": "norms behind its branches",
    "gemma3": "norms behind its branches",
    "gemma3-short": "norms behind its branches",
    "gemma3-uncapped": "norms behind its branches",
    "olmo2": "norms behind its branches",
    "olmo3": "norms behind its branches",
    "opt-350m": "the sums themselves are normed",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in families.VARIANTS]


def loud(model: Any) -> Any:
    """A prepared model with one channel of its stream fifty times as large."""
    with torch.no_grad():
        model.part("embed").weight[:, 3] *= 50
    return model


@pytest.mark.parametrize("name", [*families.FAMILIES, *SLOW])
@torch.no_grad()
def test_logits_stay_and_norms_have_weights_of_one(name: str) -> None:
    model = prepare(families.model(name))
    ids = tokens(2, 20)
    before = model(ids)
    if name in FIXED:
        state = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(UnsupportedModelError, match=FIXED[name]):
            rotate(model)
        assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
        return
    rotate(model)
    assert (model(ids) - before).abs().max() <= 1e-5 * before.abs().max()
    for block in model.part("blocks"):
        for norm, _ in block.readers():
            assert norm is None or isinstance(block.part(norm), nn.RMSNorm)
            assert norm is None or (block.part(norm).weight == 1).all()


@pytest.mark.parametrize("kind", ROTATIONS)
@torch.no_grad()
def test_a_loud_channel_is_spread_over_all(kind: str) -> None:
    model = loud(prepare(llama()))
    share = model.part("embed").weight[:, 3].abs().max() / model.part("embed").weight.abs().mean()
    rotate(model, kind=kind)
    rows = model.part("embed").weight
    assert rows.abs().max() / rows.abs().mean() < share / 4


@pytest.mark.parametrize("build", [llama, gpt2])
def test_pairs_behind_a_norm_are_still_there(build: Any) -> None:
    plain, turned = prepare(build()), prepare(build())
    rotate(turned)
    assert find_pairs(simulate(turned)).counts() == find_pairs(simulate(plain)).counts()


@torch.no_grad()
def test_a_prefix_is_computed_anew_and_seeds_count() -> None:
    model, other = prepare(llama()), prepare(llama())
    ids = tokens(1, 9)
    set_prefix(model, [5, 9])
    before = model(ids)
    rotate(model, seed=1)
    assert_close(model(ids), before, rtol=1e-4, atol=1e-4)
    rotate(other, seed=2)
    assert not torch.allclose(model.part("embed").weight, other.part("embed").weight)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 36, 640])
def test_matrices_of_any_size_are_orthogonal(kind: str, size: int) -> None:
    matrix = orthogonal(size, kind, torch.Generator().manual_seed(0))
    assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    if kind == "hadamard":
        assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-12


def test_what_cannot_be_rotated_is_refused_and_left_alone(monkeypatch: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rotate\(prepare"):
        rotate(llama())
    model = prepare(llama())
    with pytest.raises(ValueError, match="known are 'hadamard', 'random'"):
        rotate(model, kind="cayley")
    with pytest.raises(UnsupportedModelError, match="the model is a sim's"):
        rotate(simulate(model).model)
    model = prepare(gpt2())
    modules = dict(model.named_modules())
    state = {n: p.clone() for n, p in model.named_parameters()}
    wrong = lambda *_: 2 * torch.eye(32, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(rotation, "orthogonal", wrong)
    with pytest.raises((UnsupportedModelError, RuntimeError)):
        rotate(model, heads=False)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    model = prepare(llama().to(dtype))
    ids = tokens(1, 9)
    with torch.no_grad():
        before = model(ids).float()
        rotate(model)
        assert (model(ids).float() - before).abs().max() <= 0.05 * before.abs().max()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_weights_with_nan_are_refused() -> None:
    model = prepare(llama())
    with torch.no_grad():
        model.lm_head.weight[1, 2] = float("nan")
    with pytest.raises(SimError, match="NaN or inf"):
        rotate(model)


def test_rotated_weights_go_into_a_class_whose_norms_are_rmsnorms(tmp_path: Path) -> None:
    for build, fits in ((llama, True), (gpt2, False), (families.FAMILIES["phi"], False)):
        hf = build()
        model = prepare(hf)
        rotate(model)
        sim = simulate(model)
        if fits:
            save_huggingface(sim, hf, tmp_path / "llama")
        else:
            with pytest.raises(UnsupportedModelError, match=r"rotate"):
                save_huggingface(sim, hf, tmp_path / "other")


def test_how_long_a_rotation_takes_is_known_before() -> None:
    model = prepare(llama())
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert rotation.seconds_to_rotate(model) > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert rotation.seconds_to_rotate(prepare(families.FAMILIES["gemma3"]())) == 0
