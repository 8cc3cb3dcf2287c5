"""Kinds of operations: which functions and modules move data, multiply, add, pool."""

from __future__ import annotations

import re

from aimet_torch.nn.modules import custom
from torch import nn

MOVES = frozenset(
    "view reshape permute transpose swapaxes movedim contiguous flatten unflatten unsqueeze "  # noqa: SIM905
    "squeeze expand expand_as repeat repeat_interleave tile __getitem__ narrow select chunk "
    "split unbind cat concat stack clone detach t T mT flip roll split_with_sizes tensor_split "
    "index_select pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
"""Functions that only move elements: they are run on the labels themselves."""

KEEPS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ prelu dropout to float half bfloat16 double neg __neg__ "  # noqa: SIM905
    "abs".split()
)
"""Functions that commute with a positive scale of their first argument."""

MODULE_MOVES = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    custom.Reshape,
    custom.Permute,
    custom.Concat,
)

MODULE_KEEPS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Identity,
)

MODULE_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    custom.MaxPool2d,
    custom.AvgPool2d,
    custom.AdaptiveAvgPool2d,
)

POOL = re.compile(r"(adaptive_)?(max|avg)_?pool([123])d", re.IGNORECASE)
"""Names of pools, functions and classes; the digit is the number of dimensions pooled."""

MEANS = {"mean", "sum"}

PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}

SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"}

QUOTIENTS = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"}

MATMULS = {"matmul", "__matmul__", "bmm"}

ATTENTION = "scaled_dot_product_attention"
