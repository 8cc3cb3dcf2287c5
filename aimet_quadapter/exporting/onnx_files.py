"""AIMET's ONNX exports, each made in a scratch folder and saved again as one clean file."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aimet_torch.onnx
import onnx
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import in_eval_mode, patch_attr
from onnx.external_data_helper import (
    ExternalDataInfo,
    set_external_data,
    uses_external_data,
)
from torch import nn

from ..checkpoint import fingerprint
from .fused_relu import quantize_before_relu
from .vocabulary import Inputs, write_by_parts
from .widths import match_widths

EXTERNAL_DATA_ABOVE = 1 << 30
"""Bytes of weights above which they go into `<file>.data`: a protobuf message ends at 2 GiB, and
one is made in memory before it is written."""

INLINE_BELOW = 1024
"""Bytes of a constant that stays in its ONNX file, as the shapes of reshapes must."""

ALIGNMENT = 4096
"""Weights start at a multiple of this, so that they can be mapped into memory."""


def write_onnx(
    sim: QuantizationSimModel,
    args: Inputs,
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

    def write(module: nn.Module, inputs: Inputs, to: Path) -> None:
        of_module = copy.copy(sim)
        of_module.model = module
        exporter = type(sim.onnx)(of_module)
        exporter.export(inputs, str(to), encoding_version=encoding_version, **settings)

    with _scratch(file.parent, sim.model) as f:
        model = write_by_parts(sim.model, args, f, write)
        f.with_suffix(".encodings").rename(encodings)
        _forget_traces(model)
        save(model, file, f.parent)


def qdq_model(model: nn.Module, args: Inputs, folder: Path, **settings: Any) -> onnx.ModelProto:
    """A sim's model with a QuantizeLinear and a DequantizeLinear for each quantizer.

    Args:
        model: the sim's model, or a module around it.
        args: inputs of the model, of the shapes that the graph takes.
        folder: beside it is room for files that go away again.
        settings: those of `exporter_settings`.
    """

    def write(module: nn.Module, inputs: Inputs, to: Path) -> None:
        aimet_torch.onnx.export(module, inputs, str(to), prequantize_constants=True, **settings)

    with _scratch(folder, model) as file:
        written = write_by_parts(model, args, file, write)
        _take_in(written, file.parent)
    _forget_traces(written)
    # What the HTP needs of a QDQ file beyond what AIMET writes; no value changes.
    quantize_before_relu(written)
    match_widths(written)
    return written


@contextmanager
def traced_once(model: nn.Module, folder: Path) -> Iterator[None]:
    """Let `write_onnx` and `qdq_model` share the trace of a model, which is most of their time.

    Both of AIMET's exporters ask torch for the same file and differ in what they make of it. Each
    that is written of the model is kept, and copied where it is asked for again: with the same
    inputs and settings, of parameters of the same shapes. Their values and the model's ranges must
    not change in the context.

    Args:
        model: the sim's model.
        folder: beside it is room for files that go away again.
    """
    export = torch.onnx.export
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:

        def once(module: Any, args: Any = (), f: Any = None, **settings: Any) -> Any:
            if module is not model:
                return export(module, args, f, **settings)
            kept, place = Path(scratch, _asked_for(module, args, settings)), Path(f).parent
            if kept.exists():
                shutil.copytree(kept, place, dirs_exist_ok=True)
                return None  # the exporters read the file
            program = export(module, args, f, **settings)
            shutil.copytree(place, kept)
            return program

        with patch_attr(torch.onnx, "export", once):
            yield


def _asked_for(module: nn.Module, args: Inputs, settings: Mapping[str, Any]) -> str:
    """A name for what a file is of; AIMET's table of operations is made anew for each."""
    shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    own = {key: value for key, value in settings.items() if key != "custom_translation_table"}
    given = [x is not None for x in args]
    return fingerprint([shapes, own, given], [x for x in args if x is not None])


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


def _forget_traces(model: onnx.ModelProto) -> None:
    """Leave out how a graph was traced: stack traces with this machine's paths, other files."""
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            tensor.ClearField("data_location")
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def save(model: onnx.ModelProto, file: Path, folder: Path | None = None) -> None:
    """Save an ONNX model, its weights in the file or, where they are many, in one beside it.

    Args:
        model: the model.
        file: where to.
        folder: holds the weights that are in files of their own.
    """
    places = [(folder or file.parent) / p for p in map(_location, model.graph.initializer) if p]
    size = sum(len(i.raw_data) for i in model.graph.initializer)
    if size + sum(p.stat().st_size for p in places) > EXTERNAL_DATA_ABOVE:
        save_with_weights_beside({file.name: model}, file.parent, f"{file.name}.data", folder)
        return
    _take_in(model, folder or file.parent)
    onnx.save(model, file)


def save_with_weights_beside(
    models: Mapping[str, onnx.ModelProto], to: Path, weights: str, folder: Path | None = None
) -> None:
    """Save ONNX models whose large constants lie in one file, equal ones once.

    Args:
        models: names of files → models; they keep no large constant in memory.
        to: the folder of the files.
        weights: name of the file of constants.
        folder: holds the weights that are in files of their own.
    """
    known: dict[bytes, int] = {}
    with (to / weights).open("wb") as stream:
        for file, model in models.items():
            for tensor in model.graph.initializer:
                own = _location(tensor)
                raw = Path(folder or to, own).read_bytes() if own else tensor.raw_data
                if len(raw) < INLINE_BELOW:
                    continue
                digest = hashlib.sha256(raw).digest()
                if digest not in known:
                    stream.write(bytes(-stream.tell() % ALIGNMENT))
                    known[digest] = stream.tell()
                    stream.write(raw)
                tensor.raw_data = b""  # what the next line asks for
                set_external_data(tensor, weights, offset=known[digest], length=len(raw))
                tensor.ClearField("raw_data")
            onnx.save(model, to / file)


def _location(tensor: onnx.TensorProto) -> str:
    """Name of the file that a constant's numbers lie in; "" where they lie in the model."""
    return ExternalDataInfo(tensor).location if uses_external_data(tensor) else ""


def _take_in(model: onnx.ModelProto, folder: Path) -> None:
    """Put the weights that are in files of their own into the model."""
    for tensor in model.graph.initializer:
        own = _location(tensor)
        if own:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = (folder / own).read_bytes()
