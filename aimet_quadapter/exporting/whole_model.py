"""A folded sim → a folder with all that a device's tools need; refuses an unfolded one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..artifacts.exported import check_export
from ..artifacts.manifest import (
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
from ..encodings.carriers import supergroups
from ..errors import CoverageError, DataError
from ..sim.checks import check_ranges
from ..sim.kernels import vectorized
from ..sim.outputs import logits_place, tensors_in
from ..sim.values import check_tensor
from .exportable import check_exportable, check_settings
from .onnx_files import exporter_settings, qdq_model, save, traced_once, write_onnx
from .reference import check_reference, write_reference


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
    docs/export.md describes every file. Of several tensors that the model returns, the first of
    three dimensions is the output `logits` (of those with `config.vocab_size` columns, if there
    are any; else the first); the i-th other one is `output_i`.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

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
        SimError: not a sim, not fp32, weights with NaN or inf, a quantizer without a range or with
            a format that files do not hold.
        UnfoldedError: the sim carries an α.
        DataError: `dummy_input` is not what the model takes or holds NaN, or `tokenizer` is no
            tokenizer.
        CoverageError: an operation that runs on the device carries no encoding.
        FileExistsError: the folder holds something.
        ValueError: `encoding_version`, `opset` or a perplexity is not possible.
    """
    check_settings(encoding_version, opset, perplexities, tokenizer)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite)
    check_exportable(sim)
    args, names = _inputs(sim.model, dummy_input)
    given = args if reference is None else _inputs(sim.model, reference, "reference")[0]
    check_reference(given, args)
    for inputs in (args,) if reference is None else (args, given):
        check_ranges(sim.model, inputs)
    with new_folder(target) as new:
        present = [n for n, x in zip(names, args, strict=True) if x is not None]
        settings = exporter_settings(present, _output_names(sim.model, args), opset)
        with traced_once(sim.model, new):
            write_onnx(sim, args, new / MODEL, new / ENCODINGS, encoding_version, **settings)
            save(qdq_model(sim.model, args, new, **settings), new / QDQ)
        write_text_files(sim.model, tokenizer, new)
        write_reference(sim, given, names, new)
        groups = supergroups(sim)
        report = check_export(new, groups)
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
            "prefix": list(getattr(sim.model, "prefix", ())),
            "quantizers": bit_widths(sim),
            "pairs": list(pairs),
            "perplexities": dict(perplexities or {}),
            "supergroups": groups,
            "operations": report.operations,
            "operations_without_encoding": list(report.missing),
            "files": hashes(new),
        }
        write_manifest(new, manifest)
    return target


def _inputs(
    model: nn.Module, given: Tensor | Sequence[Tensor | None], what: str = "dummy_input"
) -> tuple[tuple[Tensor | None, ...], list[str]]:
    """The inputs on the model's device, and for each the name of the argument it goes to."""
    args = (given,) if isinstance(given, Tensor) else tuple(given)
    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    if not args or len(names) < len(args) or args[0] is None:
        raise DataError(
            f"{what} has {len(args)} inputs, {type(model).__name__} takes "
            f"{', '.join(inspect.signature(model.forward).parameters)}. Pass tensors in this "
            "order, None for one that is left out."
        )
    for name, x in zip(names, args, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise DataError(
                f"{what} for {name} is a {type(x).__name__}: pass a tensor, e.g. "
                "model.dummy_input(length=128)."
            )
        if x is not None:
            check_tensor(x, f"{what} for {name}")
    device = next(model.parameters()).device
    return tuple(None if x is None else x.to(device) for x in args), names


def _output_names(model: nn.Module, args: tuple[Tensor | None, ...]) -> list[str]:
    """Names of the files' outputs; where no tensor can be logits, the first is called so."""
    with torch.no_grad(), in_eval_mode(model), vectorized():
        outputs = tensors_in(model(*args))
    if not outputs:
        raise DataError(
            f"{type(model).__name__} returns no tensor: nothing can be exported. Let its forward "
            "return a tensor, or a tuple or dict of them."
        )
    names = [f"output_{i}" for i in range(len(outputs))]
    names[logits_place(outputs, model) or 0] = "logits"
    return names


def write_text_files(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files and the model's config.json, if there are any."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = copy.deepcopy(config)
        if getattr(config, "tie_word_embeddings", False) and not _is_tied(model):
            config.tie_word_embeddings = False
        config.to_json_file(folder / "config.json")


def _is_tied(model: nn.Module) -> bool:
    """Whether the head still holds a token embedding's weights: α of the last norm unties it."""
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return head is None or any(t.shape == head.shape and torch.equal(t, head) for t in tables)
