"""AIMET's ONNX exports, each made in a scratch folder and saved again as one clean file."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aimet_torch.onnx
import onnx
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from .fused_relu import quantize_before_relu
from .widths import match_widths

EXTERNAL_DATA_ABOVE = 1_800_000_000
"""Bytes of ONNX from which weights go into `<file>.data`: a protobuf message ends at 2 GiB."""


def write_onnx(
    sim: QuantizationSimModel,
    args: tuple[Tensor | None, ...],
    file: Path,
    encodings: Path,
    encoding_version: str,
    **settings: Any,
) -> None:
    """Write the model without quantizers, and the encodings of its tensors.

    Args:
        sim: the sim.
        args: inputs of the model, of the shapes that the file takes.
        file: the ONNX file.
        encodings: the encodings file.
        encoding_version: schema of the encodings.
        settings: those of `exporter_settings`.
    """
    with _scratch(file.parent, sim.model) as f:
        sim.onnx.export(args, str(f), encoding_version=encoding_version, **settings)
        f.with_suffix(".encodings").rename(encodings)
        _save(f, file)


def write_qdq(
    model: nn.Module, args: tuple[Tensor | None, ...], file: Path, **settings: Any
) -> None:
    """Write a sim's model with a QuantizeLinear and a DequantizeLinear for each quantizer.

    Args:
        model: the sim's model, or a module around it.
        args: inputs of the model, of the shapes that the file takes.
        file: the ONNX file.
        settings: those of `exporter_settings`.
    """
    with _scratch(file.parent, model) as f:
        aimet_torch.onnx.export(model, args, str(f), prequantize_constants=True, **settings)
        _save(f, file, _for_device)


def _for_device(model: onnx.ModelProto) -> None:
    """What the HTP needs of a QDQ file beyond what AIMET writes; no value changes."""
    quantize_before_relu(model)
    match_widths(model)


def exporter_settings(inputs: Sequence[str], outputs: Sequence[str], opset: int) -> dict[str, Any]:
    """What both of AIMET's exporters are told, with the names of the graph's ends."""
    return {
        "input_names": list(inputs),
        "output_names": list(outputs),
        "opset_version": opset,
        "dynamo": True,
        # An int32 bias of scale (input × weight) is coarse where the input has outliers: it moved
        # logits by up to 22 steps. The sim has no such quantizer; a compiler makes its own.
        "export_int32_bias": False,
        "verbose": False,
    }


@contextmanager
def _scratch(folder: Path, model: nn.Module) -> Iterator[Path]:
    """A file to export to, in a folder beside the target that goes away again."""
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        in_eval_mode(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the exporters' own, about AIMET's and torch's insides
        yield Path(scratch, "model.onnx")


def _save(
    source: Path, target: Path, change: Callable[[onnx.ModelProto], object] | None = None
) -> None:
    """Gather an ONNX file and the weights lying beside it; leave out how it was traced."""
    size = sum(p.stat().st_size for p in source.parent.iterdir())
    model = onnx.load(source)
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")  # stack traces: this machine's paths
        part.ClearField("doc_string")
    if change is not None:
        change(model)
    external = size > EXTERNAL_DATA_ABOVE
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}.data")
