"""Outlier channels: put in before training, trained slowly, settled afterwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from .recipe import Outliers


def norms_and_consumers(model: GPT2LMHeadModel) -> list[tuple[nn.LayerNorm, nn.Parameter, int]]:
    """Every LayerNorm with the weight that reads it and that weight's input dimension."""
    blocks = model.transformer.h
    pairs = [(block.ln_1, block.attn.c_attn.weight, 0) for block in blocks]  # Conv1D: (in, out)
    pairs += [(block.ln_2, block.mlp.c_fc.weight, 0) for block in blocks]
    return [*pairs, (model.transformer.ln_f, model.lm_head.weight, 1)]  # Linear: (out, in)


def log_uniform(bounds: tuple[float, float], count: int) -> Tensor:
    """``count`` draws whose logarithm is uniform between the logarithms of the bounds."""
    low, high = (math.log(bound) for bound in bounds)
    return torch.exp(low + (high - low) * torch.rand(count))


@torch.no_grad()
def insert_outliers(model: GPT2LMHeadModel, outliers: Outliers) -> list[tuple[Tensor, Tensor]]:
    """Give every LayerNorm its outlier channels.

    The channels are the same in all norms, as they are in GPT-2; their sizes differ.

    Returns:
        For every pair of `norms_and_consumers`, the channels (C,) and their sizes (C,).
    """
    count = outliers.gain_channels + outliers.offset_channels
    channels = torch.randperm(model.config.n_embd)[:count]
    gained, shifted = channels.split([outliers.gain_channels, outliers.offset_channels])
    placed = []
    for norm, weight, dim in norms_and_consumers(model):
        gains = log_uniform(outliers.gain, len(gained))
        offsets = log_uniform(outliers.offset, len(shifted))
        norm.weight[gained] = gains
        norm.weight[shifted] = offsets**outliers.offset_gain_power
        norm.bias[shifted] = offsets * torch.randn(len(shifted)).sign()
        sizes = torch.cat([gains, offsets])
        columns = weight.index_select(dim, channels) / sizes.unsqueeze(1 - dim)
        weight.index_copy_(dim, channels, columns)
        placed.append((channels, sizes))
    return placed


@torch.no_grad()
def slow_columns(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    placed: list[tuple[Tensor, Tensor]],
    power: float,
) -> None:
    """Shorten the optimizer's step on the consumers' outlier columns by ``size ** power``.

    The optimizers' steps have the same length whatever the input's size, so without this a
    channel that is a hundred times larger would also be trained a hundred times faster.
    """
    before: list[Tensor] = []
    columns = [
        (weight, dim, channels, (sizes**power).unsqueeze(1 - dim))
        for (_, weight, dim), (channels, sizes) in zip(
            norms_and_consumers(model), placed, strict=True
        )
    ]

    def remember(*_: object) -> None:
        before[:] = [weight.index_select(dim, channels) for weight, dim, channels, _ in columns]

    @torch.no_grad()
    def shorten(*_: object) -> None:
        for old, (weight, dim, channels, divisor) in zip(before, columns, strict=True):
            new = weight.index_select(dim, channels)
            weight.index_copy_(dim, channels, old + (new - old) / divisor)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)


@torch.no_grad()
def settle_offsets(
    model: GPT2LMHeadModel, placed: list[tuple[Tensor, Tensor]], outliers: Outliers
) -> None:
    """Set the weight of the offset channels, which the trained network reads as constants."""
    for (norm, _, _), (channels, _) in zip(norms_and_consumers(model), placed, strict=True):
        norm.weight[channels[outliers.gain_channels :]] = outliers.offset_gain
