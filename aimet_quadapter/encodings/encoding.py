"""An encoding in short, the row of one operation, and where a module keeps its quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.onnx_utils import map_torch_types_to_onnx
from aimet_torch.quantization.base import QuantizerBase
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..models.prepended import Prepended
from ..sim.operations import MODULE_MOVES, MOVES, PRODUCTS, SUMS
from ..sim.trace import Node, Value

MOVING_FUNCTIONS = MOVES | {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "dropout",
    "type_as",
    "topk",
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
MOVING_MODULES = (*MODULE_MOVES, *DROPOUTS, nn.Identity, Prepended)
FUNCTION_TYPES = {**dict.fromkeys(SUMS, "Add"), **dict.fromkeys(PRODUCTS, "Mul")}


@dataclass(frozen=True)
class Encoding:
    """A quantizer in short.

    Attributes:
        bits: bit width; None for a float format.
        symmetric: whether 0 lies in the middle.
        channels: number of scales; 1 is per tensor.
        ready: whether it has a range.
        owner: the quantizer it stands for; two tensors share an encoding if it is one.
    """

    bits: int | None
    symmetric: bool
    channels: int
    ready: bool
    owner: int

    @classmethod
    def of(cls, quantizer: Any) -> Encoding:
        shape = getattr(quantizer, "shape", ())
        channels = 1
        for size in shape:
            channels *= size
        return cls(
            bits=getattr(quantizer, "bitwidth", None),
            symmetric=bool(getattr(quantizer, "symmetric", False)),
            channels=channels,
            ready=bool(quantizer.is_initialized()),
            owner=id(quantizer),
        )

    def __str__(self) -> str:
        text = "float" if self.bits is None else f"{'s' if self.symmetric else 'u'}{self.bits}"
        return text + (f"×{self.channels}" if self.channels > 1 else "") + "?" * (not self.ready)


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: the module's name, or the function's.
        operation: class of the module, or "function".
        inputs: encoding of each tensor it reads, None where it carries none.
        parameters: encoding of each parameter, by name.
        outputs: encoding of each tensor it makes.
        note: why something carries none.
        missing: whether a device would need one that is not there.
    """

    name: str
    operation: str
    inputs: tuple[Encoding | None, ...]
    parameters: dict[str, Encoding | None]
    outputs: tuple[Encoding | None, ...]
    note: str
    missing: bool

    @property
    def encodings(self) -> list[Encoding]:
        """Those it carries."""
        found = (*self.inputs, *self.parameters.values(), *self.outputs)
        return [e for e in found if e is not None]

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """The row of a table; `?` marks a quantizer without range, `-` no encoding."""

        def text(encodings: Sequence[Encoding | None]) -> str:
            return " ".join("-" if e is None else str(e) for e in encodings)

        parameters = " ".join(f"{n}:{'-' if e is None else e}" for n, e in self.parameters.items())
        note = f"MISSING: {self.note}" if self.missing else self.note
        return (
            self.name,
            self.operation,
            text(self.inputs),
            parameters,
            text(self.outputs),
            note,
        )


def operands(node: Node) -> list[Any]:
    """Its tensors in order: a `Value`, or the tensor itself where it is a constant."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if isinstance(x, (Value, Tensor))]


def moves(node: Node) -> bool:
    """Whether an operation only moves elements, or does nothing outside training."""
    if node.module is None:
        return node.name in MOVING_FUNCTIONS
    return isinstance(node.module, MOVING_MODULES)


def onnx_types(node: Node) -> set[str]:
    """ONNX types of an operation, as AIMET's config files name them."""
    if node.module is None:
        return {FUNCTION_TYPES.get(node.name, node.name)}
    for cls in type(node.module).__mro__:
        if cls in map_torch_types_to_onnx:
            return set(map_torch_types_to_onnx[cls])
    return {type(node.module).__name__}


def quantizer(module: nn.Module | None, where: str, place: int) -> QuantizerBase | None:
    """A module's quantizer in `input_quantizers` or `output_quantizers`, None if there is none."""
    quantizers = getattr(module, where, [])
    return quantizers[place] if place < len(quantizers) else None


def has_quantizers(module: nn.Module) -> bool:
    """Whether a module carries any quantizer."""
    return any(isinstance(m, QuantizerBase) for m in module.modules())


def parameter_quantizers(module: nn.Module | None) -> dict[str, QuantizerBase | None]:
    """Parameter name → its quantizer, None where it has none."""
    if module is None:
        return {}
    names = [n for n, _ in module.named_parameters(recurse=False)]
    own = module.param_quantizers.items() if isinstance(module, BaseQuantizationMixin) else ()
    quantizers = dict(own)
    return {n: quantizers.get(n) for n in names}
