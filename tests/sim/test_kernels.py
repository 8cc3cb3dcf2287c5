"""Fake quantization by whole tensors: torch's values to the bit, and torch's own elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import logits, outlier_gpt2, outlier_llama, ready
from torch import Tensor

from aimet_quadapter.sim import kernels
from aimet_quadapter.sim.kernels import vectorized

tensor = torch.fake_quantize_per_tensor_affine
channel = torch.fake_quantize_per_channel_affine


def values(scale: Tensor, generator: torch.Generator) -> Tensor:
    """In and beyond the range, ties of the rounding, zeros of both signs, very small and large."""
    x = torch.randn(64, 48, generator=generator) * 100 * scale
    x[:16] = (torch.randint(-300, 300, (16, 48), generator=generator) + 0.5) * scale
    x[16:22] = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e15 * scale, -3e38])[:, None]
    return x


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_value_is_torchs(bits: int, symmetric: bool, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "TENSOR", None)  # nothing here may be left to torch
    monkeypatch.setattr(kernels, "CHANNEL", None)
    generator = torch.Generator().manual_seed(bits)
    qmin, qmax = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    points = torch.randint(qmin, qmax + 1, (64,), generator=generator, dtype=torch.int32)
    if symmetric:
        points.zero_()
    for size in (1e-6, 0.013, 7.0):
        scales = size * (0.5 + torch.rand(64, generator=generator))
        x = values(scales[0], generator)
        cases: list[tuple[Callable[..., Tensor], tuple[object, ...]]] = [
            (tensor, (x, scales[0], points[0], qmin, qmax)),
            (channel, (x, scales, points, 0, qmin, qmax)),
            (channel, (x, scales[:48], points[:48], 1, qmin, qmax)),
        ]
        expected = [function(*given) for function, given in cases]
        with vectorized():
            tensors = torch.fake_quantize_per_tensor_affine(*cases[0][1])
            found = [tensors, *(torch.fake_quantize_per_channel_affine(*c[1]) for c in cases[1:])]
        for y, wanted in zip(found, expected, strict=True):
            assert torch.equal(y, wanted)
            assert torch.equal(y.signbit(), wanted.signbit())


def test_gradients_other_types_and_wrong_zero_points_are_torchs() -> None:
    scale, point = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    x = torch.randn(5, 4, requires_grad=True)
    with vectorized():
        y = torch.fake_quantize_per_tensor_affine(x, scale, point, 0, 15)
        half = torch.fake_quantize_per_tensor_affine(x.detach().bfloat16(), scale, point, 0, 15)
        by_number = torch.fake_quantize_per_tensor_affine(x.detach(), 0.1, 3, 0, 15)
        with pytest.raises(RuntimeError, match="zero_point"):
            torch.fake_quantize_per_channel_affine(
                x, torch.ones(5), torch.full((5,), 99, dtype=torch.int32), 0, 0, 15
            )
    assert torch.equal(y, by_number)
    assert torch.equal(half, tensor(x.detach().bfloat16(), scale, point, 0, 15))
    y.sum().backward()
    assert x.grad is not None
    inside = (x.detach() / 0.1 + 3).round()
    assert torch.equal(x.grad, ((inside >= 0) & (inside <= 15)).float())


def test_what_is_not_finite_is_not_hidden() -> None:
    x, scale = torch.tensor([float("nan"), float("inf"), -float("inf")]), torch.tensor(0.1)
    with vectorized():
        y = torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor(3), 0, 15)
    assert y[0].isnan()
    assert torch.allclose(y[1:], torch.tensor([1.2, -0.3]))


@pytest.mark.parametrize("build", [outlier_gpt2, outlier_llama])
def test_a_sim_gives_the_same_logits_and_torch_is_as_it_was(build, monkeypatch) -> None:
    sim = ready(build, "htp_v73")
    plain = logits(sim)
    calls = []
    quantized = kernels._quantized
    monkeypatch.setattr(kernels, "_quantized", lambda *x: calls.append(1) or quantized(*x))
    with vectorized():
        assert torch.equal(logits(sim), plain)
    with pytest.raises(KeyboardInterrupt), vectorized():
        raise KeyboardInterrupt
    assert len(calls) > 20  # AIMET comes this way
    assert torch.fake_quantize_per_tensor_affine is tensor
    assert torch.fake_quantize_per_channel_affine is channel
