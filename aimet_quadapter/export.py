"""A folded sim → a folder with all that a device's tools need; refuses an unfolded one."""

from __future__ import annotations

import inspect
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
from aimet_torch.common.quantsim import VALID_ENCODING_VERSIONS
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn
from transformers import PretrainedConfig

from .attach import attached_modules
from .errors import CoverageError, DataError, SimError, UnfoldedError
from .exported import check_export
from .manifest import (
    ENCODINGS,
    FORMAT,
    MODEL,
    QDQ,
    bit_widths,
    check_target,
    describe_input,
    hashes,
    new_folder,
    versions,
    write_manifest,
)
from .reference import check_reference, write_reference

OPSETS = (21, 22, 23)
"""QDQ nodes of 4 and 16 bits exist from 21 on; `RMSNormalization` is one operation from 23 on."""

EXTERNAL_DATA_ABOVE = 1_800_000_000
"""Bytes of ONNX from which weights go into `<file>.data`: a protobuf message ends at 2 GiB."""


def export(
    sim: QuantizationSimModel,
    dummy_input: Tensor | Sequence[Tensor | None],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    reference: Tensor | Sequence[Tensor | None] | None = None,
    encoding_version: str = "1.0.0",
    opset: int = 23,
    perplexities: Mapping[str, float] | None = None,
    pairs: Sequence[str] = (),
    strict: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a folded sim as ONNX + encodings and as QDQ ONNX, with a manifest.

    The folder appears at once and complete, or not at all. The sim is not changed.
    docs/export.md describes every file.

    Args:
        sim: an AIMET sim in fp32 with its ranges set and no α attached.
        dummy_input: inputs of the model, in the order of its `forward`, e.g.
            `model.dummy_input(length=128)`; None for one that is left out. Their shapes become
            the shapes of the files: a device compiles for fixed ones.
        folder: where to; must not exist or be empty.
        tokenizer: a HuggingFace tokenizer to be saved along.
        reference: inputs shaped like `dummy_input`, real text best, that go into the folder with
            the logits they give, for `verify`; `dummy_input` itself when None.
        encoding_version: schema of `model.encodings`, one of AIMET's.
        opset: ONNX opset of both files, 21 to 23.
        perplexities: name → perplexity, copied into the manifest.
        pairs: names of the pairs that were folded, copied into the manifest.
        strict: raise when an operation has no encoding; False notes it in the manifest.
        overwrite: replace a folder that holds an earlier export and nothing else.

    Returns:
        The folder, absolute.

    Raises:
        SimError: not a sim, not fp32, or a quantizer without a range.
        UnfoldedError: the sim carries an α.
        DataError: `dummy_input` is not what the model takes, or `tokenizer` is no tokenizer.
        CoverageError: an operation that runs on the device carries no encoding.
        FileExistsError: the folder holds something.
        ValueError: `encoding_version`, `opset` or a perplexity is not possible.
    """
    _check_settings(encoding_version, opset, perplexities, tokenizer)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite)
    _check_sim(sim)
    args, names = _inputs(sim.model, dummy_input)
    given, _ = _inputs(sim.model, dummy_input if reference is None else reference)
    check_reference(given, args)
    for inputs in (args,) if reference is None else (args, given):
        _check_ranges(sim.model, inputs)
    with new_folder(target) as new:
        _write_onnx(sim, args, names, new, encoding_version, opset)
        _write_rest(sim.model, tokenizer, new)
        write_reference(sim, given, names, new)
        report = check_export(new)
        if strict and not report.ok:
            raise CoverageError(
                f"{report}\nexport(..., strict=False) writes the files all the same."
            )
        manifest = {
            "format": FORMAT,
            "model": getattr(sim.model, "hf_class", type(sim.model).__name__),
            "versions": versions(),
            "encoding_version": encoding_version,
            "opset": opset,
            "inputs": [
                describe_input(n, x) for n, x in zip(names, args, strict=True) if x is not None
            ],
            "output": "logits",
            "quantizers": bit_widths(sim),
            "pairs": list(pairs),
            "perplexities": dict(perplexities or {}),
            "operations": report.operations,
            "operations_without_encoding": list(report.missing),
            "files": hashes(new),
        }
        write_manifest(new, manifest)
    return target


def _check_settings(
    encoding_version: str, opset: int, perplexities: Mapping[str, float] | None, tokenizer: Any
) -> None:
    if encoding_version not in VALID_ENCODING_VERSIONS:
        raise ValueError(
            f"encoding_version is {encoding_version!r}, AIMET writes "
            f"{', '.join(VALID_ENCODING_VERSIONS)}. Take the one your compiler reads."
        )
    if opset not in OPSETS:
        raise ValueError(
            f"opset is {opset!r}, possible are {', '.join(map(str, OPSETS))}: below 21 there are "
            "no 4- and 16-bit QDQ nodes, above 23 torch's exporter ends. Leave it at 23."
        )
    for name, value in (perplexities or {}).items():
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"perplexity {name!r} is {value!r}: it must be a positive number.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise DataError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: pass a "
            "HuggingFace tokenizer (AutoTokenizer.from_pretrained(...)), or none."
        )


def _check_sim(sim: object) -> None:
    if not isinstance(sim, QuantizationSimModel):
        raise SimError(
            f"export takes an aimet_torch.QuantizationSimModel, not a {type(sim).__name__}. "
            "Pass the sim itself, not sim.model."
        )
    carriers = attached_modules(sim)
    if carriers:
        raise UnfoldedError(
            f"α is attached to {', '.join(carriers)}: the files would hold weights without it. "
            "Fold it first: fold(sim)."
        )
    for name, parameter in sim.model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise SimError(
                f"{name} is {parameter.dtype}: AIMET writes QDQ files from float32 models only. "
                "Build the sim from prepare(model.float()) and export that."
            )


def _inputs(
    model: nn.Module, dummy_input: Tensor | Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], list[str]]:
    """The inputs on the model's device, and for each the name of the argument it goes to."""
    args = (dummy_input,) if isinstance(dummy_input, Tensor) else tuple(dummy_input)
    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    if not args or len(names) < len(args) or args[0] is None:
        raise DataError(
            f"dummy_input has {len(args)} inputs, {type(model).__name__} takes "
            f"{', '.join(inspect.signature(model.forward).parameters)}. Pass tensors in this "
            "order, None for one that is left out."
        )
    for name, x in zip(names, args, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise DataError(
                f"dummy_input for {name} is a {type(x).__name__}: pass a tensor, e.g. "
                "model.dummy_input(length=128)."
            )
    device = next(model.parameters()).device
    return tuple(None if x is None else x.to(device) for x in args), names


def _check_ranges(model: nn.Module, args: tuple[Tensor | None, ...]) -> None:
    """Run the model once; raise SimError if it reaches a quantizer that has no range."""
    reached: list[str] = []
    handles = [
        module.register_forward_pre_hook(_Reached(name, reached))
        for name, module in model.named_modules()
        if isinstance(module, QuantizerBase) and not module.is_initialized()
    ]
    try:
        with torch.no_grad(), in_eval_mode(model):
            model(*args)
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        if not reached:
            raise DataError(
                f"{type(model).__name__} does not run on dummy_input: {e}. Pass what the model "
                "takes, e.g. model.dummy_input(length=128)."
            ) from e
    finally:
        for handle in handles:
            handle.remove()
    if reached:
        raise SimError(
            f"the quantizer {reached[0]} has no range. Set the ranges on calibration data, with "
            "the same inputs given: sim.compute_encodings(lambda model: ...)."
        )


class _Reached:
    """A hook that notes the name of the module it hangs on."""

    def __init__(self, name: str, reached: list[str]) -> None:
        self.name = name
        self.reached = reached

    def __call__(self, *_: object) -> None:
        self.reached.append(self.name)


def _write_onnx(
    sim: QuantizationSimModel,
    args: tuple[Tensor | None, ...],
    names: list[str],
    folder: Path,
    encoding_version: str,
    opset: int,
) -> None:
    """AIMET's two exports, each made in a scratch folder and saved again as one file."""
    settings: dict[str, Any] = {
        "input_names": [n for n, x in zip(names, args, strict=True) if x is not None],
        "output_names": ["logits"],
        "opset_version": opset,
        "dynamo": True,
        # An int32 bias of scale (input × weight) is coarse where the input has outliers: it moved
        # logits by up to 22 steps. The sim has no such quantizer; a compiler makes its own.
        "export_int32_bias": False,
        "verbose": False,
    }
    with _scratch(folder) as f, in_eval_mode(sim.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, about AIMET's and torch's insides
        sim.onnx.export(args, str(f), encoding_version=encoding_version, **settings)
        f.with_suffix(".encodings").rename(folder / ENCODINGS)
        _save(f, folder / MODEL)
    with _scratch(folder) as f, in_eval_mode(sim.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aimet_torch.onnx.export(sim.model, args, str(f), prequantize_constants=True, **settings)
        _save(f, folder / QDQ)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        yield Path(scratch, "model.onnx")


def _save(source: Path, target: Path) -> None:
    """Gather an ONNX file and the weights lying beside it; leave out how it was traced."""
    size = sum(p.stat().st_size for p in source.parent.iterdir())
    model = onnx.load(source)
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")  # stack traces: this machine's paths
        part.ClearField("doc_string")
    external = size > EXTERNAL_DATA_ABOVE
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}.data")


def _write_rest(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config.to_json_file(folder / "config.json")
