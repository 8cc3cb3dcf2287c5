"""A folded sim → a prompt graph and a one-token graph with a KV cache, in one folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import torch
from aimet_torch import QuantizationSimModel
from onnx import ModelProto, NodeProto
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from ..artifacts.exported import without_encoding
from ..artifacts.manifest import (
    DECODE,
    FORMAT,
    GENERATION,
    PROMPT,
    WEIGHTS,
    bit_widths,
    check_target,
    hashes,
    new_folder,
    versions,
    write_manifest,
)
from ..encodings.carriers import supergroups
from ..errors import CoverageError
from ..models import PreparedDecoder
from ..sim.checks import check_ranges
from .cached_model import Cached, DecodeGraph, PromptGraph, find_cached
from .exportable import check_exportable, check_settings
from .onnx_files import exporter_settings, qdq_model, save_with_weights_beside
from .whole_model import write_text_files


def export_generation(
    sim: QuantizationSimModel,
    folder: str | Path,
    *,
    prompt_length: int = 128,
    cache_length: int = 512,
    tokenizer: Any = None,
    opset: int = 23,
    overwrite: bool = False,
) -> Path:
    """Write a folded sim as the two QDQ graphs that generation on a device needs.

    `prompt_qdq.onnx`: token ids (1, P) → logits (1, P, V), keys and values (1, K, P, D) of each
    layer, behind those of the model's prefix if it has one. `decode_qdq.onnx`: token id (1, 1),
    position (1, 1), mask (1, 1, 1, N), keys and values (1, K, N − 1, D) → logits (1, 1, V), keys
    and values (1, K, 1, D). Keys and values are integers under the encoding of the tensor they
    are; every encoding is the sim's. The folder appears at once and complete, or not at all, and
    the sim is not changed. See docs/generation.md.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: as in `export`; of a model that `prepare` made.
        folder: where to; must not exist or be empty.
        prompt_length: P, the longest prompt.
        cache_length: N, tokens that attention sees, the new one and the prefix among them;
            prefix + P < N ≤ the model's positions.
        tokenizer: a HuggingFace tokenizer to be saved along: then prompts may be text.
        opset: ONNX opset of both files, 21 to 23.
        overwrite: replace a folder that holds an earlier export and nothing else.

    Returns:
        The folder, absolute; for `generate_on_cpu` and `generate_on_htp`.

    Raises:
        SimError: as in `export`, or a model without a cache.
        UnsupportedModelError: a cache of that length is longer than a sliding window, or the model
            has ALiBi positions.
        UnfoldedError: the sim carries an α.
        DataError: `tokenizer` is no tokenizer.
        CoverageError: an operation, or what goes into the cache, carries no encoding.
        FileExistsError: the folder holds something.
        ValueError: the lengths or `opset` are not possible.
    """
    check_settings("1.0.0", opset, None, tokenizer)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite)
    check_exportable(sim)
    _check_lengths(sim.model, prompt_length, cache_length)
    check_ranges(sim.model, sim.model.dummy_input())
    if isinstance(sim.model, PreparedDecoder):
        sim.model.check_cache(cache_length)
    cached = find_cached(sim.model)
    with new_folder(target) as new:
        models = {
            PROMPT: _prompt(sim.model, cached, prompt_length, opset, new),
            DECODE: _decode(sim.model, cached, cache_length, opset, new),
        }
        caches = _describe_caches(models[DECODE], cached)
        for model in models.values():
            make_caches_integer(model, [c.name for c in cached])
        save_with_weights_beside(models, new, WEIGHTS)
        write_text_files(sim.model, tokenizer, new)
        manifest = {
            "format": FORMAT,
            "kind": GENERATION,
            "model": getattr(sim.model, "hf_class", type(sim.model).__name__),
            "versions": versions(),
            "opset": opset,
            "prompt_length": prompt_length,
            "cache_length": cache_length,
            "mask_value": sim.model.mask_value,
            "prefix": list(sim.model.prefix),
            "end_tokens": _end_tokens(sim.model),
            "cache": caches,
            "quantizers": bit_widths(sim),
            "operations": {file: _operations(new / file, sim) for file in models},
            "files": hashes(new),
        }
        write_manifest(new, manifest)
    return target


def _check_lengths(model: Any, prompt_length: int, cache_length: int) -> None:
    prefix = len(getattr(model, "prefix", ()))
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, value in (("prompt_length", prompt_length), ("cache_length", cache_length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: pass a number of tokens, at least 1.")
    if cache_length <= prefix + prompt_length:
        behind = f" behind a prefix of {prefix}" if prefix else ""
        raise ValueError(
            f"cache_length is {cache_length}, prompt_length {prompt_length}{behind}: the cache "
            f"holds the prompt and what follows it. Make it longer than {prefix + prompt_length}."
        )
    if positions is not None and cache_length > positions:
        raise ValueError(
            f"cache_length is {cache_length}, the model has {positions} positions "
            f"(max_position_embeddings): pass at most {positions}."
        )


def _end_tokens(model: Any) -> list[int]:
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, Iterable) else [found]
    return []


def _prompt(
    model: Any, cached: Sequence[Cached], length: int, opset: int, folder: Path
) -> ModelProto:
    ids = model.dummy_input(length=length)
    return _qdq(PromptGraph(model), ids, ["input_ids"], cached, opset, folder)


def _decode(
    model: Any, cached: Sequence[Cached], length: int, opset: int, folder: Path
) -> ModelProto:
    (ids,) = model.dummy_input(length=1)
    position = torch.full_like(ids, length - 1)
    mask = torch.zeros(1, 1, 1, length, device=ids.device)
    past = [c.empty(length - 1).to(ids.device) for c in cached]
    names = ["input_ids", "position_ids", "mask", *(f"past_{c.name}" for c in cached)]
    graph = DecodeGraph(model, [c.quantizer for c in cached])
    return _qdq(graph, (ids, position, mask, *past), names, cached, opset, folder)


def _qdq(
    graph: nn.Module,
    args: tuple[Tensor, ...],
    inputs: list[str],
    cached: Sequence[Cached],
    opset: int,
    folder: Path,
) -> ModelProto:
    """The QDQ model of a graph with its weights in memory."""
    outputs = ["logits", *(c.name for c in cached)]
    return qdq_model(graph, args, folder, **exporter_settings(inputs, outputs, opset))


def _describe_caches(decode: ModelProto, cached: Sequence[Cached]) -> list[dict[str, Any]]:
    """What an application must know of each cache: shape, integer type, scale and zero point."""
    constants = {tensor.name: tensor for tensor in decode.graph.initializer}
    shapes = {x.name: x.type.tensor_type.shape.dim for x in decode.graph.input}
    described = []
    for c in cached:
        node = _quantize_of(decode, f"past_{c.name}")
        scale, zero_point = (to_array(constants[name]) for name in node.input[1:3])
        described.append(
            {
                "name": c.name,
                "shape": [d.dim_value for d in shapes[f"past_{c.name}"]],
                "dtype": str(zero_point.dtype),
                "scale": float(scale),
                "zero_point": int(zero_point),
                "producer": c.producer,
            }
        )
    return described


def make_caches_integer(model: ModelProto, names: Iterable[str]) -> None:
    """Let keys and values enter and leave a QDQ graph as the integers they are, in place.

    The QuantizeLinear behind each input `past_<name>` and the DequantizeLinear before each output
    `<name>` go: nothing is rounded twice, and the cache takes a quarter or half of the memory.
    """
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    inputs = {x.name: x for x in graph.input}
    outputs = {x.name: x for x in graph.output}
    for name in names:
        if f"past_{name}" in inputs:
            node = _quantize_of(model, f"past_{name}")
            inputs[f"past_{name}"].type.tensor_type.elem_type = types[node.input[2]]
            _rename(model, {node.output[0]: f"past_{name}"})
            graph.node.remove(node)
        (node,) = [n for n in graph.node if name in n.output]
        if node.op_type != "DequantizeLinear":
            raise CoverageError(f"{name} leaves the graph without an encoding: {node.op_type}.")
        outputs[name].type.tensor_type.elem_type = types[node.input[2]]
        _rename(model, {name: f"{name}_float", node.input[0]: name})


def _quantize_of(model: ModelProto, name: str) -> NodeProto:
    readers = [n for n in model.graph.node if name in n.input]
    if [n.op_type for n in readers] != ["QuantizeLinear"]:
        raise CoverageError(f"{name} enters the graph without an encoding.")
    return readers[0]


def _rename(model: ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in list(model.graph.value_info):
        if value.name in {*names, *names.values()}:
            model.graph.value_info.remove(value)  # of the old type


def _operations(file: Path, sim: Any) -> int:
    """Number of device operations in a QDQ file; raises if one carries no encoding."""
    fused = {pair for group in supergroups(sim) for pair in pairwise(group)}
    count, bare = without_encoding(onnx.load(file, load_external_data=False), fused=fused)
    if bare:
        raise CoverageError(
            f"{len(bare)} operations of {file.name} carry no encoding on their output, so a "
            f"device computes them in floats or on the CPU: {', '.join(bare[:10])}. "
            "print(coverage(sim)) says why."
        )
    return count
