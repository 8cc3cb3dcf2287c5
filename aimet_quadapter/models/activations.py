"""Activation functions as modules that AIMET can quantize, by HuggingFace's names."""

from __future__ import annotations

from collections.abc import Callable

from aimet_torch.nn.modules.custom import Multiply
from torch import Tensor, nn


class SiLU(nn.Module):
    """x · sigmoid(x), the two operations a device runs; ONNX has no SiLU before opset 24.

    With `nn.SiLU` the exported Sigmoid carries no encoding.
    """

    module_site = "mul"
    """The operation that stands for the whole where AIMET's own sites are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.mul = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        return self.mul(x, self.sigmoid(x))


class SquaredReLU(nn.Module):
    """max(x, 0)², as two operations."""

    module_site = "mul"
    """The operation that stands for the whole where AIMET's own sites are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.mul = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        positive = self.relu(x)
        return self.mul(positive, positive)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_fast": lambda: nn.GELU(approximate="tanh"),
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_python": nn.GELU,
    "gelu_python_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "silu": SiLU,
    "swish": SiLU,
}
"""HuggingFace's name of an activation function → the torch module AIMET can quantize."""


def activation(name: str) -> nn.Module:
    """The module of an activation function by HuggingFace's name."""
    return ACTIVATIONS[name]()


def missing_activation(name: str) -> list[str]:
    """A line for `Decoder.unsupported` when an activation function is not known."""
    if name in ACTIVATIONS:
        return []
    return [f"activation function {name!r} (known: {', '.join(sorted(ACTIVATIONS))})"]
