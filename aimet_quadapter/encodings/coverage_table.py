"""Which operation of a sim carries an encoding, which does not, and why.

A device runs in integers only what carries an encoding; the rest falls back to the CPU or to
floats. AIMET puts quantizers at modules, so a function outside a module has none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aimet_torch.nn import BaseQuantizationMixin
from torch import nn

from ..errors import CoverageError, SimError
from ..models.attention import Attention
from ..sim.inputs import example_inputs
from ..sim.samples import checked
from ..sim.trace import record
from .encoding import Row
from .rows import describe

CUSTOM_MODULES = "aimet_torch._base.nn.modules.custom"
"""Where AIMET keeps the modules that stand for a function (Add, MatMul, …)."""


@dataclass(frozen=True)
class Coverage:
    """Every operation of a sim's graph, in order of execution, with its encodings."""

    rows: tuple[Row, ...]

    @property
    def missing(self) -> tuple[Row, ...]:
        """Operations that lack an encoding which a device needs."""
        return tuple(r for r in self.rows if r.missing)

    @property
    def without_range(self) -> tuple[Row, ...]:
        """Operations with a quantizer that has no range yet: `sim.compute_encodings` sets them."""
        return tuple(r for r in self.rows if any(not e.ready for e in r.encodings))

    def __str__(self) -> str:
        head = ("operation", "type", "inputs", "parameters", "outputs", "note")
        lines = [head, *(r.cells() for r in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        table = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, "", self.summary()])

    def summary(self) -> str:
        """One line: how many operations, how many lack an encoding or a range."""
        text = f"{len(self.rows)} operations, {len(self.missing)} lack an encoding"
        if self.without_range:
            text += f", {len(self.without_range)} have a quantizer without range"
        return text


def coverage(sim: Any, dummy_input: Any = None, strict: bool = False) -> Coverage:
    """List every operation that runs on the device with its encodings, or why it has none.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET `QuantizationSimModel`, before or after `compute_encodings`.
        dummy_input: as in `find_pairs`.
        strict: raise when an operation lacks an encoding which a device needs.

    Returns:
        The table; `print` it, or see `Coverage.missing`.

    Raises:
        SimError: not a sim, or an input is needed and was not given.
        DataError: `dummy_input` does not fit the model.
        CoverageError: `strict`, and an encoding is missing.
    """
    inputs = checked(example_inputs(sim, dummy_input), sim.model, "dummy_input")
    result = Coverage(tuple(describe(sim, record(sim.model, inputs))))
    if strict and result.missing:
        raise CoverageError(_complaint(result.missing))
    return result


def _complaint(missing: tuple[Row, ...], shown: int = 10) -> str:
    lines = [f"{len(missing)} operations lack an encoding which a device needs:"]
    lines += [f"  {r.name} ({r.operation}): {r.note}" for r in missing[:shown]]
    if len(missing) > shown:
        lines.append(f"  … and {len(missing) - shown} more: print(coverage(sim))")
    lines.append(
        "Prepare the model first (prepare(model)), or put AIMET's modules "
        "(aimet_torch.nn.modules.custom) in place of the functions; for a quantizer that is off, "
        "see the sim's config_file and what switched it off (keep_module_sites does)."
    )
    return "\n".join(lines)


def keep_module_sites(sim: Any, keep: Iterable[str] = ()) -> list[str]:
    """Leave a prepared model's sim the quantizers it would have without `prepare`.

    Embedding, norms, linears and activation functions keep theirs, as in the paper, and so does
    gate × up, which AIMET quantizes at the input of Llama's `down_proj`. Other operations that are
    functions in HuggingFace's own model lose theirs: residual and mask sums, rotary positions,
    both matrix products, the scale of the scores and the softmax.

    Args:
        sim: the sim of a model that `prepare` made.
        keep: patterns of module names that keep their quantizers nevertheless, such as
            `"*.add_mlp"`.

    Returns:
        Names of the modules whose quantizers were switched off.

    Raises:
        SimError: not a sim.
    """
    if not hasattr(sim, "model"):
        raise SimError(
            f"expected an aimet_torch.QuantizationSimModel, got {type(sim).__name__}. Create one: "
            "sim = QuantizationSimModel(model, dummy_input)."
        )
    keep = tuple(keep)
    off = []
    for parent_name, parent in sim.model.named_modules():
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}".lstrip(".")
            kept = any(fnmatch.fnmatchcase(name, k) for k in keep)
            if not kept and _is_function(parent, child_name, child) and _switch_off(child):
                off.append(name)
    return off


def _is_function(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether a module stands for a function of HuggingFace's own model."""
    if not isinstance(child, BaseQuantizationMixin):
        return False
    if name in getattr(parent, "module_inputs", ()):  # AIMET quantizes it as an input
        return False
    site = getattr(parent, "module_site", None)  # one operation stands for the parent
    if site is not None:
        return name != site
    custom = any(cls.__module__ == CUSTOM_MODULES for cls in type(child).__mro__)
    return custom or (isinstance(parent, Attention) and isinstance(child, nn.Softmax))


def _switch_off(module: Any) -> bool:
    """Remove a module's activation quantizers; whether it had any."""
    found = False
    for quantizers in (module.input_quantizers, module.output_quantizers):
        for i, quantizer in enumerate(quantizers):
            found = found or quantizer is not None
            quantizers[i] = None
    return found
