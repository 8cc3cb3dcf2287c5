"""Orthogonal matrices of any size, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal(size: int, kind: str, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (size, size).

    "random": Q of a Gaussian matrix, uniform over all orthogonal ones. "hadamard": with size =
    2^k · m, m odd, S (H ⊗ T): H the Hadamard matrix of 2^k, T the Hartley matrix of m,
    T_jk = (cos 2πjk/m + sin 2πjk/m) / √m, and S random signs. No entry is larger than √(2/size), so
    a vector with one large channel becomes one whose largest is at most √2 times its root mean
    square; of a random matrix that would be about √(2 ln size).

    Args:
        size: number of rows.
        kind: one of `ROTATIONS`.
        generator: what random numbers come from.
    """
    if kind == "random":
        return _random(size, generator)
    power = size & -size
    matrix = torch.kron(_hadamard(power), _hartley(size // power))
    signs = torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * matrix


def _random(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def _hadamard(size: int) -> Tensor:
    """Sylvester's, of a power of two, divided by √size."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix


def _hartley(size: int) -> Tensor:
    """Hartley's, divided by √size; symmetric."""
    j = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / size * (j[:, None] * j[None, :])
    return (angle.cos() + angle.sin()) / size**0.5
