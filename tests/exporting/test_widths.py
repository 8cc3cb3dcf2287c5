"""Exports of sims with activations of 8 and of 16 bits: the same values, and they lower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from aimet_torch import QuantizationSimModel
from deployed import LENGTH, check_same_but_for_rounding, embedded, steps, text
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import decoder_sim, gpt2, llama, tokens

from aimet_quadapter import (
    analytic_alphas,
    compile_for_htp,
    export,
    export_generation,
    find_pairs,
    fold,
    generate_on_htp,
    load_default,
    perplexity,
    perplexity_on_htp,
    prepare,
    run_on_cpu,
    run_on_htp,
    set_ranges,
    set_residual_bits,
)
from aimet_quadapter.artifacts.exported import QDQ_TYPES, check_export
from aimet_quadapter.artifacts.manifest import MODEL, QDQ
from aimet_quadapter.exporting.widths import match_widths
from aimet_quadapter.sim.sites import set_output_bits

RESIDUAL = ("*.o_proj", "*.down_proj", "*.c_proj", "*.add_attn", "*.add_mlp", "*.add_embeddings")
CONSTANTS = ("*.scale_scores", "*.mul_cos")
"""Sites whose operation reads a constant: the scale of the scores, the table of cosines."""
WIDTHS = {"residual": RESIDUAL, "constants": CONSTANTS, "softmax": ("*.softmax",)}


def mixed_sim(make: Any, patterns: Sequence[str]) -> QuantizationSimModel:
    sim = decoder_sim(make(layers=1), config_file="htp_v73")
    set_output_bits(sim, patterns, 16)
    sim.compute_encodings(lambda m: m(tokens()))
    return sim


def types_around(model: onnx.ModelProto) -> list[tuple[str, set[int]]]:
    """For each operation the integer types of the activations at its sides."""
    zero_points = {t.name: t.data_type for t in model.graph.initializer if not t.dims}
    producer = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type in QDQ_TYPES:
            continue
        around = [producer[n] for n in node.input if n in producer]
        around += [n for n in model.graph.node if set(n.input) & set(node.output)]
        around = [q for q in around if q.op_type in QDQ_TYPES and len(q.input) > 2]
        if node.op_type in ("MatMul", "Gather", "RMSNormalization", "LayerNormalization"):
            weights = {node.input[1]} if len(node.input) > 1 else set()
            constant = {t.name for t in model.graph.initializer}
            around = [q for q in around if q.output[0] not in weights or q.input[0] not in constant]
        found.append((node, {zero_points[q.input[2]] for q in around} - {0}))
    read_by = {name: node for node in model.graph.node for name in node.input}
    result = {node.name: types for node, types in found}
    for node, types in found:  # a product and the sum with its bias are one operation
        reader = read_by.get(node.output[0])
        if reader is not None and reader.op_type not in QDQ_TYPES:
            result[reader.name] |= types
    return list(result.items())


@pytest.fixture(scope="module", params=WIDTHS)
def exported(request, tmp_path_factory) -> tuple[QuantizationSimModel, Path]:
    """A Llama with some sites of 16 bits; sim and export."""
    sim = mixed_sim(llama, WIDTHS[request.param])
    return sim, export(sim, tokens(1, 12), tmp_path_factory.mktemp("widths") / "out")


def test_every_operation_has_one_width_and_the_values_are_the_sims(exported) -> None:
    sim, folder = exported
    assert check_export(folder).ok
    model = onnx.load(folder / QDQ)
    onnx.checker.check_model(model, full_check=True)
    around = types_around(model)
    assert len({t for _, types in around for t in types}) == 2
    assert all(len(types) <= 1 for _, types in around), [x for x in around if len(x[1]) > 1]
    found = steps(run_on_cpu(folder, tokens(1, 12)), sim, tokens(1, 12))
    check_same_but_for_rounding(found)  # an 8-bit result that is rounded twice among it


def test_a_gpt2s_linear_with_a_bias_is_one_operation(tmp_path) -> None:
    sim = mixed_sim(gpt2, RESIDUAL)
    folder = export(sim, tokens(1, 12), tmp_path / "out")
    assert check_export(folder).ok
    around = types_around(onnx.load(folder / QDQ))
    assert all(len(types) <= 1 for _, types in around)
    check_same_but_for_rounding(steps(run_on_cpu(folder, tokens(1, 12)), sim, tokens(1, 12)))


def test_operations_that_read_one_another_twice_stay_a_graph() -> None:
    """Concat of one operation and of both parts of another, with no quantizer between."""
    q = functools.partial(helper.make_node, "QuantizeLinear")
    dq = functools.partial(helper.make_node, "DequantizeLinear")
    nodes = []
    for name, end in (("x", "8"), ("w", "8")):
        ends = [f"s{end}", f"z{end}"]
        nodes += [q([name, *ends], [f"{name}_q"]), dq([f"{name}_q", *ends], [f"{name}_d"])]
    nodes += [
        helper.make_node("Relu", ["x_d"], ["a"]),
        helper.make_node("Split", ["w_d"], ["b1", "b2"], axis=0, num_outputs=2),
        helper.make_node("Concat", ["a", "b1", "b2"], ["c"], axis=0),
        q(["c", "s16", "z16"], ["c_q"]),
        dq(["c_q", "s16", "z16"], ["o"]),
    ]
    values = {"s8": np.float32(0.1), "z8": np.uint8(3), "s16": np.float32(1e-3)}
    values["z16"] = np.uint16(9)
    float1 = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "g",
        [float1("x", shape=[2]), float1("w", shape=[2])],
        [float1("o", shape=[4])],
        [numpy_helper.from_array(np.array(v), k) for k, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def run() -> np.ndarray:
        onnx.checker.check_model(model, full_check=True)
        given = {"x": np.float32([1, 2]), "w": np.float32([0.1, 0.23])}  # none at a .5
        return ReferenceEvaluator(model).run(None, given)[0]

    before = run()
    assert match_widths(model) == 2
    assert np.allclose(run(), before, atol=1e-6)
    assert all(len(types) <= 1 for _, types in types_around(model))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_file_of_one_width_is_not_changed(bits) -> None:
    model = onnx.load(embedded(bits)[1] / QDQ)
    before = model.SerializeToString()
    assert match_widths(model) == 0
    assert model.SerializeToString() == before


def test_a_value_of_8_bits_is_one_of_16(exported) -> None:
    """The conversion behind an input loses nothing."""
    model = onnx.load(exported[1] / QDQ)
    initializers = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    wide = [n for n in model.graph.node if n.output[0].endswith("_wide_q")]
    inputs = [q for q in wide if producer[q.input[0]].op_type == "DequantizeLinear"]
    assert inputs
    for q in inputs:
        scale, zero_point = (initializers[x] for x in producer[q.input[0]].input[1:])
        wide_scale, wide_zero_point = (initializers[x] for x in q.input[1:])
        values = (np.arange(256, dtype=np.float32) - np.float32(zero_point)) * scale
        integers = np.clip(np.round(values / wide_scale) + wide_zero_point, 0, 65535)
        again = (integers - np.float32(wide_zero_point)) * wide_scale
        assert np.allclose(again, values, rtol=1e-6, atol=0)


@pytest.mark.deploy
def test_a_llama_of_two_widths_runs_whole_on_the_htp(exported) -> None:
    sim, folder = exported
    done = compile_for_htp(folder)
    print(done)
    assert done.operations >= check_export(folder).operations[MODEL]
    assert steps(run_on_htp(folder, tokens(1, 12)), sim, tokens(1, 12)).mean() <= 3


@pytest.mark.deploy
def test_the_embedded_model_with_a_residual_stream_of_16_bits_on_the_htp(tmp_path) -> None:
    hf, _ = load_default()
    model = prepare(hf)
    samples = text()[: 4 * LENGTH].reshape(4, 1, LENGTH)
    sim = QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73")
    pairs = find_pairs(sim, kinds=model.default_kinds)
    fold(sim, pairs, analytic_alphas(sim, samples, pairs, "smoothquant"))
    set_residual_bits(sim)
    set_ranges(sim, samples)
    folder = export(sim, model.dummy_input(length=LENGTH), tmp_path / "out")
    heldout = text("heldout")[: 8 * LENGTH]
    on_htp, simulated = perplexity_on_htp(folder, heldout), perplexity(sim, heldout, LENGTH)
    print(f"residual stream of 16 bits: sim {simulated:.2f}, HTP {on_htp:.2f}")
    assert on_htp == pytest.approx(simulated, rel=0.01)


@pytest.mark.deploy
def test_two_widths_generate_on_the_htp(tmp_path) -> None:
    sim = mixed_sim(llama, RESIDUAL)
    export_generation(sim, tmp_path / "out", prompt_length=8, cache_length=24)
    assert len(generate_on_htp(tmp_path / "out", tokens(1, 8)[0].tolist(), 6).ids) == 6
