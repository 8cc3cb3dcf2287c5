"""ONNX files whose large tables, of a row a token, are written a part of the rows at a time.

AIMET's writers take ten times a weight's memory, and an embedding of 262 144 tokens and its head
are most of a small model. Every row of them is written alike: the graph is traced with a few rows,
and AIMET writes the table's module alone, with one part of the rows after the other.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from onnx import ModelProto, TensorProto
from onnx.numpy_helper import from_array, to_array
from torch import Tensor, nn

from ..progress import progress
from ..sim.outputs import logits_place, tensors_in

logger = logging.getLogger(__name__)

LARGE = 1 << 26
"""Numbers in a table from which it is written by parts."""

PART = 1 << 24
"""Numbers of a table that are written at once."""

FEW = 251
"""Rows of a table in the traced graph: a prime, so that no other size is the same by chance."""

TOKENS = (torch.int32, torch.int64)
"""Types of token ids; those of the traced graph are among the few."""

PACKED = (TensorProto.INT4, TensorProto.UINT4)
"""Types of which two numbers share a byte."""

Inputs = tuple[Tensor | None, ...]
Writer = Callable[[nn.Module, Inputs, Path], None]
"""Writes a module's ONNX file; encodings, if it writes any, lie beside it."""


class _UnlikeError(Exception):
    """Why a model's file is not the files of its tables' parts."""


def write_by_parts(model: nn.Module, args: Inputs, file: Path, write: Writer) -> ModelProto:
    """Write a model's file, its large tables by parts of their rows.

    These are linear modules with a row for each logit and embeddings of as many rows, of `LARGE`
    numbers or more. Where a part is not written as the whole is, everything is written at once,
    with a warning that says why.

    Args:
        model: a sim's model, or a module around it.
        args: its inputs.
        file: the ONNX file, in a folder that holds nothing else. The encodings beside it are
            complete afterwards; the file is not where there are large tables.
        write: what writes it.

    Returns:
        The whole ONNX model; the numbers of large tables lie in files of their own in the folder.
    """
    rows, tables = _tables(model, args)
    if tables:
        try:
            return _written(model, args, rows, tables, file, write)
        except _UnlikeError as e:
            logger.warning(
                "%s: %s. The file is written at once, in ten times the memory of these weights.",
                ", ".join(tables),
                e,
            )
            for left in file.parent.iterdir():
                left.unlink()
    write(model, args, file)
    return onnx.load(file)


def _tables(model: nn.Module, args: Inputs) -> tuple[int, list[str]]:
    """How many logits there are, and the large modules with a row for each."""
    large = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.Linear)) and module.weight.numel() >= LARGE
    ]
    if not large:
        return 0, []
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        outputs = tensors_in(model(*args))
    place = logits_place(outputs, model)
    rows = 0 if place is None else outputs[place].shape[-1]
    shapes = ((name, module.weight.shape) for name, module in large)
    return rows, [name for name, shape in shapes if shape[0] == rows > FEW != shape[1]]


def _written(
    model: nn.Module, args: Inputs, rows: int, tables: Sequence[str], file: Path, write: Writer
) -> ModelProto:
    few = tuple(x % FEW if x is not None and x.dtype in TOKENS else x for x in args)
    _check_logits(model, few, tables)
    with _cut(model, tables):
        write(model, few, file)
    gc.collect()  # the exporter leaves cycles that hold all weights
    graph = onnx.load(file)
    _check_graph(graph, tables)
    encodings = _Encodings(file)
    for _, name in zip(progress(len(tables), "writing tables"), tables, strict=True):
        _write_table(model.get_submodule(name), name, graph, encodings, file, write)
    encodings.save()
    for value in (*graph.graph.value_info, *graph.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value == FEW:
                size.dim_value = rows
    return graph


def _check_logits(model: nn.Module, args: Inputs, tables: Sequence[str]) -> None:
    """Raise _UnlikeError unless few rows give the first columns of what all rows give."""
    with torch.no_grad(), in_eval_mode(model), remove_all_quantizers(model):
        whole = [y[..., :FEW] if y.dim() else y for y in tensors_in(model(*args))]
        try:
            with _cut(model, tables):
                cut = tensors_in(model(*args))
        except (RuntimeError, IndexError) as e:
            raise _UnlikeError(f"the model does not run with few rows ({e})") from e
    if [y.shape for y in cut] != [y.shape for y in whole] or not all(
        torch.allclose(part, first, rtol=0, atol=1e-4 * float(first.abs().max()))
        for part, first in zip(cut, whole, strict=True)
    ):
        raise _UnlikeError("their first rows alone do not give the first logits")


def _check_graph(graph: ModelProto, tables: Sequence[str]) -> None:
    """Raise _UnlikeError if the graph's own constants depend on the number of rows."""
    attributes = [a for node in graph.graph.node for a in node.attribute]
    constants = [a.t for a in attributes if a.HasField("t")]
    own = tuple(f"{name}." for name in tables)
    constants += [i for i in graph.graph.initializer if not i.name.startswith(own)]
    if any(FEW in (a.i, *a.ints) for a in attributes) or any(
        FEW in c.dims or (c.data_type == TensorProto.INT64 and (to_array(c) == FEW).any())
        for c in constants
    ):
        raise _UnlikeError("the graph knows how many rows there are")


@contextmanager
def _cut(model: nn.Module, tables: Sequence[str]) -> Iterator[None]:
    """Leave each table's first rows alone in the model."""
    with ExitStack() as stack:
        for name in tables:
            path, _, child = name.rpartition(".")
            parent, module = model.get_submodule(path), model.get_submodule(name)
            stack.callback(setattr, parent, child, module)
            setattr(parent, child, _some_rows(module, 0, FEW))
        yield


def _some_rows(module: Any, begin: int, end: int) -> Any:
    """A quantized module with some of its rows: views of its weights and of their ranges."""
    rows = module.weight.shape[0]
    views: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.shape[:1] == (rows,):
            view = tensor.detach()[begin:end]
            is_parameter = isinstance(tensor, nn.Parameter)
            views[id(tensor)] = nn.Parameter(view, False) if is_parameter else view
    part = copy.deepcopy(module, views)
    for quantizer in part.modules():
        if getattr(quantizer, "shape", ())[:1] == (rows,):
            quantizer.shape = (end - begin, *quantizer.shape[1:])
    if isinstance(part, nn.Embedding):
        part.num_embeddings, part.padding_idx = end - begin, None
    else:
        part.out_features = end - begin
    return part


class _Alone(nn.Module):
    """A module under the name that it has in a larger one, so that its weights have it too."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        *path, child = name.split(".")
        parent: nn.Module = self
        for step in path:
            setattr(parent, step, nn.Module())
            parent = getattr(parent, step)
        setattr(parent, child, module)
        self.name = name

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule(self.name)(x)


def _write_table(
    module: Any, name: str, graph: ModelProto, encodings: _Encodings, file: Path, write: Writer
) -> None:
    """Put all rows of a table into a traced graph and its encodings."""
    rows, width = module.weight.shape
    example = torch.zeros(1, 1, width, device=module.weight.device)
    if isinstance(module, nn.Embedding):
        example = example[..., 0].long()
    traced = {i.name: i for i in graph.graph.initializer if i.name.startswith(f"{name}.")}
    whole = {key: _Rows(few, rows, file.parent) for key, few in traced.items() if FEW in few.dims}
    found: list[_Encodings] = []
    step = max(PART // width, FEW + 1)
    for begin in range(0, rows, step):
        part = _some_rows(module, begin, min(begin + step, rows))
        with TemporaryDirectory(dir=file.parent) as folder:
            target = Path(folder, file.name)
            write(_Alone(name, part), (example,), target)
            found.append(_Encodings(target))
            tensors = {i.name: to_array(i) for i in onnx.load(target).graph.initializer}
        if missing := traced.keys() - tensors.keys():
            raise _UnlikeError(f"a part is written without {', '.join(sorted(missing))}")
        for key, few in traced.items():
            if key in whole:
                whole[key].put(tensors[key], begin)
            elif not _same(to_array(few), tensors[key]):
                raise _UnlikeError(f"{key} is another one in each part")
    for tensor in whole.values():
        tensor.finish()
    encodings.join(traced, found)


class _Rows:
    """A tensor of a graph that gets all its rows, in a file of its own."""

    def __init__(self, tensor: TensorProto, rows: int, folder: Path) -> None:
        self.tensor = tensor
        self.few = to_array(tensor)
        self.axis = self.few.shape.index(FEW)
        self.rows = rows
        self.inner = math.prod(self.few.shape[self.axis + 1 :])
        with NamedTemporaryFile(dir=folder, suffix=".rows", delete=False) as stream:
            self.file = Path(stream.name)

    def put(self, part: np.ndarray, begin: int) -> None:
        """Write some rows where they belong; the first part must begin with the graph's rows."""
        if begin == 0 and not _same(self.few, part.take(range(FEW), self.axis)):
            raise _UnlikeError(f"{self.tensor.name} is another one with more rows")
        size = self.inner * part.itemsize
        with self.file.open("r+b") as stream:
            for place, rows in enumerate(part.reshape(-1, part.shape[self.axis] * self.inner)):
                stream.seek((place * self.rows + begin) * size)
                stream.write(rows.tobytes())

    def finish(self) -> None:
        """Let the tensor have all rows, its numbers in the file."""
        shape = [self.rows if a == self.axis else n for a, n in enumerate(self.few.shape)]
        if self.tensor.data_type in PACKED:
            numbers = np.fromfile(self.file, self.few.dtype).reshape(shape)
            self.file.write_bytes(from_array(numbers).raw_data)
        self.tensor.dims[:] = shape
        self.tensor.ClearField("raw_data")
        self.tensor.data_location = TensorProto.EXTERNAL
        self.tensor.external_data.add(key="location", value=self.file.name)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


class _Encodings:
    """The encodings beside an ONNX file, by the names of tensors; none if there is no file."""

    def __init__(self, file: Path) -> None:
        self.file = file.with_suffix(".encodings")
        self.content = json.loads(self.file.read_bytes()) if self.file.is_file() else {}
        self.named: dict[str, Any] = {}
        for key in ("param_encodings", "encodings"):
            table = self.content.get(key, {})
            self.named |= table if isinstance(table, dict) else {e["name"]: e for e in table}

    def join(self, names: Iterable[str], parts: Sequence[_Encodings]) -> None:
        """Put the encodings of all parts in the place of those of few rows."""
        for name in self.named.keys() & set(names):
            whole = _joined(self.named[name], [part.named[name] for part in parts])
            if isinstance(whole, dict):
                self.named[name].update(whole)
            else:
                self.named[name][:] = whole

    def save(self) -> None:
        if self.content:
            self.file.write_text(json.dumps(self.content, indent=2), encoding="utf-8")


def _joined(few: Any, parts: Sequence[Any]) -> Any:
    """What encodings of parts say together; lists hold rows, blocks of rows, or such lists."""
    first = parts[0]
    if all(part == few for part in parts):
        return few
    if isinstance(few, dict):
        return {key: _joined(few[key], [part[key] for part in parts]) for key in few}
    if isinstance(few, list):
        if len(few) == len(first):
            return [_joined(*x) for x in zip(few, zip(*parts, strict=True), strict=True)]
        if first[: len(few)] == few:
            return list(chain(*parts))
        blocks = len(few) // FEW
        if blocks > 1:
            by_block = zip(*(_split(part, blocks) for part in parts), strict=True)
            return list(chain(*map(_joined, _split(few, blocks), by_block)))
    raise _UnlikeError("the encoding of a part is not that of the whole")


def _split(values: list[Any], parts: int) -> list[list[Any]]:
    size = len(values) // parts
    return [values[begin : begin + size] for begin in range(0, len(values), size)]
