"""Fake quantization by parts: AIMET's values and gradients, and AIMET's own elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.affine.backends import torch_builtins
from torch import Tensor
from torch.testing import assert_close

from aimet_quadapter.sim import gradients
from aimet_quadapter.sim.gradients import by_parts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "a part": lambda x: x[:, 5:20],
    "expanded": lambda x: x[:, :1].expand(-1, 7),
    "one value": lambda x: x[3, 4],
}


def quantizer(
    shape: tuple[int, ...], bits: int, symmetric: bool, learned: bool
) -> QuantizeDequantize:
    """A quantizer whose range leaves out about a tenth of a normal distribution."""
    q = QuantizeDequantize(shape, bits, symmetric)
    wide = 1.6 + 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    q.set_range(-wide if symmetric else -wide + 0.3, wide)
    return q.requires_grad_(learned)


def computed(q: QuantizeDequantize, x: Tensor, of_x: bool = True) -> list[Tensor]:
    """y, ∂L/∂x, ∂L/∂min, ∂L/∂max with a random ∂L/∂y."""
    x = x.detach().requires_grad_(of_x)
    y = q(x)
    inputs = [t for t in (x, *q.parameters()) if t.requires_grad]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return [y, *torch.autograd.grad(y, inputs, grad)]


def compared(q: QuantizeDequantize, x: Tensor, of_x: bool = True) -> None:
    """The same to the bit, or for sums over many elements to 1e-5."""
    expected = computed(q, x, of_x)
    with by_parts():
        found = computed(q, x, of_x)
    for y, wanted in zip(found, expected, strict=True):
        if y.shape == x.shape and x.dim():
            assert torch.equal(y, wanted)
        assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def all_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and an error where something is left to torch or AIMET."""
    monkeypatch.setattr(gradients, "PART", 100)
    monkeypatch.setattr(gradients, "TENSOR", None)
    monkeypatch.setattr(gradients, "CHANNEL", None)
    learned = gradients._Learned
    monkeypatch.setattr(gradients, "_Learned", lambda theirs: learned(None))


@pytest.mark.usefixtures("all_here")
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_values_and_gradients_are_aimets(bits: int, learned: bool) -> None:
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        for layout in LAYOUTS.values():
            compared(quantizer((), bits, symmetric, learned), layout(x))
    for shape in ((40, 1), (48,), (1, 48)):
        compared(quantizer(shape, bits, True, learned), x)
    if learned:
        compared(quantizer((40, 1), bits, True, learned), x, of_x=False)
        compared(quantizer((), bits, False, learned), x, of_x=False)
        blocks = QuantizeDequantize((40, 4), bits, True, block_size=(1, 12))
        blocks.set_range(-torch.ones(40, 4), torch.ones(40, 4))
        compared(blocks, x)


def test_what_does_not_fit_is_aimets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_QuantizeDequantize", None)  # nothing here is computed by parts
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for learned in (True, False):
        compared(quantizer((6, 1), 8, False, learned), x)  # an offset for each channel
        compared(quantizer((), 8, True, learned), x.double())
        compared(quantizer((6, 1), 8, True, learned), x.t().contiguous().t())


def test_torch_and_aimet_are_as_they_were_after_an_error() -> None:
    before = torch_builtins.QuantDequantFunc, torch.fake_quantize_per_tensor_affine
    with pytest.raises(KeyboardInterrupt), by_parts():
        raise KeyboardInterrupt
    assert (torch_builtins.QuantDequantFunc, torch.fake_quantize_per_tensor_affine) == before
