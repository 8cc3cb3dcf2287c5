"""Orthogonal matrices of any size, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("hadamard", "random")


def orthogonal(size: int, kind: str, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (size, size).

    "random": Q of a Gaussian matrix, uniform over all orthogonal ones. "hadamard": with size =
    2^k · m, m odd, S (H ⊗ Q): H the Hadamard matrix of 2^k, all of whose entries have one
    magnitude, Q a random one of m, S random signs. Every entry is then of the order of 1/√size.

    Args:
        size: number of rows.
        kind: one of `KINDS`.
        generator: what random numbers come from.
    """
    if kind == "random":
        return _random(size, generator)
    power = size & -size
    matrix = torch.kron(_hadamard(power), _random(size // power, generator))
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
