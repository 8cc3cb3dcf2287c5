"""Exports that the tests of deployment share: built once a process."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from aimet_torch import QuantizationSimModel
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from aimet_quadapter import (
    CalibrationConfig,
    apply_quadapter,
    default_text,
    export,
    load_default,
    prepare,
)
from aimet_quadapter.artifacts.manifest import FORMAT, hashes

LENGTH = 64

ROUNDING = {8: (0.5, 4), 16: (8, 128)}
"""Bits of the activations → mean and largest difference of the logits, in steps.

Float32 sums in another order differ in their last bits. Where such a sum lies at a rounding's .5
the rounded value moves by a step, and some of what is computed from it by one or two. That is rare
at 8 bits and common at 16, whose step is 256 times smaller; which values it hits the processor
decides: the embedded sim, W8A8, is 0.25 steps from itself in float64 on average and 2 at most. A
wrong scale, zero point or operation moves most logits, further than the mean here.
"""


@functools.cache
def text(part: str = "calibration") -> Tensor:
    """Tokens (N,) of the embedded model's text."""
    _, tokenizer = load_default()
    return tokenizer(default_text(part)[:40_000], return_tensors="pt", verbose=False).input_ids[0]


@functools.cache
def embedded(bits: int) -> tuple[QuantizationSimModel, Path]:
    """The embedded GPT-2 after Quadapter, W8 and `bits` for activations; sim and export."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    model, tokenizer = load_default()
    ids = text()[: 4 * LENGTH].reshape(4, LENGTH)
    sim = QuantizationSimModel(
        prepare(model), ids[:1], config_file="htp_v73", default_output_bw=bits
    )
    # Analytic scales: learned ones would differ from processor to processor, and take longer.
    apply_quadapter(sim, ids[:, None], calibration=CalibrationConfig(steps=0))
    reference = text("heldout")[None, :LENGTH]
    return sim, export(sim, ids[:1], folder / "out", tokenizer=tokenizer, reference=reference)


def copy(folder: Path, to: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folder, to))


def seal(folder: Path) -> Path:
    """Write a manifest with the hashes the files have now."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text()) if file.exists() else {"format": FORMAT}
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(manifest | {"files": hashes(folder)}))
    return folder


def quantized(operation: str, *constants: np.ndarray, **attributes: Any) -> onnx.ModelProto:
    """A QDQ model of one operation on x (2, 4, 8), named like the operation."""
    at = {"in_s": np.float32(0.1), "in_z": np.uint8(128), "out_s": np.float32(0.1)}
    initializers = {**at, "out_z": np.uint8(128)}
    initializers |= {f"c{i}": c for i, c in enumerate(constants)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "in_s", "in_z"], ["xq"], name="Qx"),
        helper.make_node("DequantizeLinear", ["xq", "in_s", "in_z"], ["xd"], name="DQx"),
        helper.make_node(
            operation,
            ["xd", *(f"c{i}" for i in range(len(constants)))],
            ["y"],
            name=f"the_{operation}",
            **attributes,
        ),
        helper.make_node("QuantizeLinear", ["y", "out_s", "out_z"], ["yq"], name="Qy"),
        helper.make_node("DequantizeLinear", ["yq", "out_s", "out_z"], ["logits"], name="DQy"),
    ]
    shape = [2, 4, 8]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def folder_of(model: onnx.ModelProto, to: Path) -> Path:
    """A folder that holds a QDQ file and its manifest, as far as running it needs."""
    to.mkdir()
    onnx.save(model, to / "model_qdq.onnx")
    return seal(to)


def check_same_but_for_rounding(found: np.ndarray, bits: int = 8) -> None:
    """Assert that `steps` are what sums in another order do."""
    mean, largest = ROUNDING[bits]
    print(f"A{bits}: {found.mean():.4f} steps mean, {found.max():.2f} largest")
    assert found.mean() <= mean
    assert found.max() <= largest


def steps(got: np.ndarray, sim: QuantizationSimModel, *inputs: Tensor) -> np.ndarray:
    """|difference| from the sim's logits in output steps."""
    with torch.no_grad():
        expected = sim.model(*inputs).numpy()
    scale = sim.model.lm_head.output_quantizers[0].get_scale()
    return np.abs(got - expected) / float(scale.detach())
