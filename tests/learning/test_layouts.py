"""Rows of a block are tokens, pixels or time steps, wherever the channels lie."""

from __future__ import annotations

import pytest
import torch
from tiny import BLOCKS, FAST, make_sim
from torch import nn

from aimet_quadapter import calibrate, find_pairs
from aimet_quadapter.learning.block_error import BlockError
from aimet_quadapter.learning.blocks import capture
from aimet_quadapter.sim.samples import as_samples


def convolutions(kind: type[nn.Module], between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(3, 6, 3), between, kind(6, 4, 3))


def linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))


LAYOUTS = {
    "(B, C, L)": (convolutions(nn.Conv1d, nn.ReLU()), (1, 3, 12), 8),
    "(B, C, L), PReLU per channel": (convolutions(nn.Conv1d, nn.PReLU(6)), (1, 3, 12), 8),
    "(B, C, H, W)": (convolutions(nn.Conv2d, nn.ReLU()), (1, 3, 8, 8), 16),
    "(B, C, D, H, W)": (convolutions(nn.Conv3d, nn.ReLU()), (1, 3, 6, 6, 6), 8),
    "(B, T, C)": (linears(), (1, 7, 5), 7),
    "(T, B, C)": (linears(), (7, 1, 5), 7),
    "(B, H, T, C)": (linears(), (1, 2, 7, 5), 14),
}
"""Layout → net, shape of its input, rows of its output."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_everything_but_channels(layout: str) -> None:
    net, shape, rows = LAYOUTS[layout]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    sim = make_sim(net, x)
    pairs = find_pairs(sim, x)
    ((block,),) = capture(sim, pairs, as_samples([x], sim.model), 1 << 29)
    ((target,),) = BlockError(block, FAST).targets
    assert target.shape[-1] == 4
    assert target.numel() == rows * 4
    (result,) = calibrate(sim, [x], pairs, BLOCKS).results
    assert result.loss <= result.losses["ones"]
