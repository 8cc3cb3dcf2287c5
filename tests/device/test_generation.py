"""A prompt graph and a one-token graph with a cache: what is written, and that it says the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import pytest
import torch
from aimet_torch import QuantizationSimModel
from deployed import ROUNDING
from onnx.numpy_helper import to_array
from tiny import VOCAB, decoder_sim, gpt2, llama, tokens
from torch import nn

from aimet_quadapter import (
    CalibrationConfig,
    CoverageError,
    DataError,
    SimError,
    UnfoldedError,
    UnsupportedModelError,
    apply_quadapter,
    compare_generation,
    default_text,
    export_generation,
    generate_on_cpu,
    generate_on_htp,
    keep_module_sites,
    load_default,
    prepare,
    set_residual_bits,
)
from aimet_quadapter.artifacts.exported import device_operations
from aimet_quadapter.device.generator import Generation, Generator
from aimet_quadapter.errors import CompileError, IntegrityError, MissingRuntimeError
from aimet_quadapter.exporting.cached_model import DecodeGraph, PromptGraph, find_cached
from aimet_quadapter.models.attention import MASK_VALUE

P, N = 8, 24
BOTH = {"gpt2": gpt2, "llama": llama}
VARIANTS: dict[str, Any] = {
    **BOTH,
    "gpt2-one-head": lambda: gpt2(n_head=1),
    "llama-mqa": lambda: llama(num_key_value_heads=1),
    "llama-mha-wide-heads": lambda: llama(num_key_value_heads=4, head_dim=16),
}


NEAR = {8: 2.01, 16: ROUNDING[16][1]}
"""Bits → steps of the logits within which the sim may prefer another token: at 8 bits a tie and the
step that a sum in another order may move it, at 16 what rounding alone does, half a step of 8."""


def says_what_the_sim_says(sim: QuantizationSimModel, got: Generation, bits: int = 8) -> bool:
    """Whether every token is the sim's choice after the same text, but for near ties."""
    return all(d.gap <= NEAR[bits] for d in compare_generation(sim, got).differences)


def small_sim(make: Any, bits: int = 8, **settings: Any) -> QuantizationSimModel:
    return decoder_sim(
        make(),
        calibrated=True,
        **({"config_file": "htp_v73", "default_output_bw": bits} | settings),
    )


@pytest.fixture(scope="module", params=BOTH)
def exported(request, tmp_path_factory) -> tuple[QuantizationSimModel, Path]:
    sim = small_sim(functools.partial(BOTH[request.param], layers=1))
    before = {k: v.clone() for k, v in sim.model.state_dict().items() if torch.is_tensor(v)}
    folder = tmp_path_factory.mktemp("generation") / request.param
    export_generation(sim, folder, prompt_length=P, cache_length=N)
    after = sim.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # the sim is not changed
    assert not [k for k in after if k not in sim.model.state_dict()]
    return sim, folder


@pytest.fixture(scope="module")
def generator(exported) -> Generator:
    return Generator.on_cpu(exported[1])


@pytest.fixture(scope="module")
def sim() -> QuantizationSimModel:
    return small_sim(gpt2)


def prompt(length: int = P, seed: int = 0) -> list[int]:
    return tokens(1, length, seed)[0].tolist()


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_step_by_step_the_sims_logits(name: str) -> None:
    """The graphs in torch, with more room than tokens: after every token what the sim says."""
    sim = small_sim(VARIANTS[name])
    sim.model.double()  # sums in another order then differ by less than any rounding sees
    ids, length = tokens(1, 14), 20
    expected = sim.model(ids)[0]
    cached = find_cached(sim.model)
    logits, *new = PromptGraph(sim.model)(ids[:, :6])
    rows = list(logits[0])
    past = [c.empty(length - 1).double() for c in cached]
    for slots, values in zip(past, new, strict=True):
        slots[:, :, :6] = values
    graph = DecodeGraph(sim.model, [c.quantizer for c in cached])
    for i in range(6, 14):
        mask = torch.full((1, 1, 1, length), MASK_VALUE, dtype=torch.float64)
        mask[..., :i] = mask[..., -1] = 0
        logits, *new = graph(ids[:, i : i + 1], torch.tensor([[i]]), mask, *past)
        rows.append(logits[0, 0])
        for slots, values in zip(past, new, strict=True):
            slots[:, :, i : i + 1] = values
    step = float(sim.model.lm_head.output_quantizers[0].get_scale())
    assert (torch.stack(rows) - expected).abs().max() <= 1e-3 * step


def test_keys_and_values_carry_the_encoding_of_what_makes_them() -> None:
    names = {
        "gpt2": ["transformer.h.0.attn.c_attn"] * 2,
        "llama": ["model.layers.0.self_attn.rotary_k.add", "model.layers.0.self_attn.v_proj"],
    }
    for name, make in BOTH.items():
        sim = small_sim(make)
        found = find_cached(sim.model)
        assert [c.name for c in found] == ["key_0", "value_0", "key_1", "value_1"]
        assert [c.producer for c in found[:2]] == names[name]
        for c in found:
            module = sim.model.get_submodule(c.producer)
            assert c.quantizer is module.output_quantizers[0]


def test_the_text_is_the_sims(exported, generator) -> None:
    sim, folder = exported
    for length in (1, 5, P):
        n = N + 1 - length
        got = generator(prompt(length), n)
        assert says_what_the_sim_says(sim, got)
        start = torch.tensor([got.prompt])
        settings = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        ids = sim.model.generate(start, attention_mask=torch.ones_like(start), **settings)
        # The same text but where tokens tie: at each place either is the sim's choice.
        own = dataclasses.replace(got, ids=tuple(ids[0, length:].tolist()))
        assert says_what_the_sim_says(sim, own)
        assert got.text is None
        assert len(got.seconds) == len(got.ids)
    assert generate_on_cpu(folder, torch.tensor([got.prompt]), n) == got
    assert generate_on_cpu(folder, np.array(got.prompt), n) == got


def quantized(model: onnx.ModelProto) -> list[tuple[str, float, int]]:
    """Type, scale and zero point at the output of every device operation, in order."""
    constants = {t.name: to_array(t) for t in model.graph.initializer if not t.external_data}
    encodings = {
        n.input[0]: (float(constants[n.input[1]]), int(constants[n.input[2]]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }
    return [(node.op_type, *encodings[output]) for node, output in device_operations(model)]


def test_both_graphs_have_the_same_encodings_and_integer_caches(exported) -> None:
    _, folder = exported
    models = {
        name: onnx.load(folder / f"{name}_qdq.onnx", load_external_data=False)
        for name in ("prompt", "decode")
    }
    # Llama: 1 × (2 norms, 7 Linears, 6 rotary, 5 of attention, 2 SiLU, product, 2 sums), norm, …
    assert len(quantized(models["decode"])) == {"gpt2": 17, "llama": 27}[folder.name]
    assert quantized(models["prompt"]) == quantized(models["decode"])
    assert not {n.op_type for n in models["decode"].graph.node} & {"GatherND", "If", "Loop"}
    manifest = json.loads((folder / "manifest.json").read_text())
    caches = {c["name"]: c for c in manifest["cache"]}
    heads = {"gpt2": 4, "llama": 2}[folder.name]
    assert all(c["shape"] == [1, heads, N - 1, 8] for c in caches.values())
    for model in models.values():
        readers: dict[str, tuple[float, int]] = {}
        constants = {t.name: to_array(t) for t in model.graph.initializer if not t.external_data}
        for n in model.graph.node:
            if n.op_type == "DequantizeLinear" and n.input[1] in constants:
                readers[n.input[0]] = (constants[n.input[1]], constants[n.input[2]])
        for value in [*model.graph.input, *model.graph.output]:
            cache = caches.get(value.name.removeprefix("past_"))
            if cache is not None:
                assert value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
                scale, zero_point = readers[value.name]
                assert scale == np.float32(cache["scale"])
                assert zero_point == cache["zero_point"]
                assert cache["dtype"] == "uint8"


def test_the_weights_lie_in_the_folder_once(exported) -> None:
    sim, folder = exported
    files = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert set(files) == {
        "prompt_qdq.onnx",
        "decode_qdq.onnx",
        "weights.bin",
        "config.json",
        "manifest.json",
    }
    where: dict[str, list[tuple[str, str]]] = {}
    for name in ("prompt_qdq.onnx", "decode_qdq.onnx"):
        for t in onnx.load(folder / name, load_external_data=False).graph.initializer:
            if t.external_data:
                entries = {e.key: e.value for e in t.external_data}
                assert entries["location"] == "weights.bin"
                where.setdefault(t.name, []).append((entries["offset"], entries["length"]))
    weights = [k for k in where if k.endswith("weight_0_q")]
    linears = [m for m in sim.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(weights) == sum(m.weight.numel() >= 1024 for m in linears)  # others stay inline
    assert all(len(where[k]) == 2 and len(set(where[k])) == 1 for k in weights)


def test_the_manifest_describes_the_files(exported) -> None:
    _, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert manifest["kind"] == "generation"
    assert (manifest["prompt_length"], manifest["cache_length"]) == (P, N)
    assert manifest["mask_value"] == MASK_VALUE
    assert manifest["end_tokens"] == [2]
    assert set(manifest["operations"]) == {"prompt_qdq.onnx", "decode_qdq.onnx"}
    root = str(Path(torch.__file__).parents[1]).encode()
    assert not [p.name for p in folder.iterdir() if root in p.read_bytes()]


def test_it_ends_with_an_end_token(exported, generator) -> None:
    _, folder = exported
    whole = generator(prompt(), 10)
    other = Generator(folder, generator.graphs.prompt, generator.graphs.decode)
    other.graphs.manifest["end_tokens"] = [whole.ids[3]]
    first = whole.ids.index(whole.ids[3]) + 1
    assert other(prompt(), 10).ids == whole.ids[:first]


def test_a_difference_is_measured_in_steps(exported, generator) -> None:
    sim, _ = exported
    got = generator(prompt(), 6)
    ids = list(got.ids)
    for place in range(3):  # the sim's own choices, computed as they will be compared
        with torch.no_grad():
            logits = sim.model(torch.tensor([[*got.prompt, *ids[:-1]]]))[0, P - 1 + place]
        ids[place] = int(logits.numpy().argmax())
    other = int(logits.argmin())
    forged = dataclasses.replace(got, ids=(*ids[:2], other, *ids[3:]))
    result = compare_generation(sim, forged)
    (found,) = [d for d in result.differences if d.place == 2]
    step = float(sim.model.lm_head.output_quantizers[0].get_scale().detach())
    assert (found.token, found.expected) == (other, ids[2])
    assert found.gap == pytest.approx(float(logits.max() - logits.min()) / step)
    assert not result.explained
    assert result.equal == 2
    assert f"token 2: {other}, the sim says {found.expected}" in str(result)
    assert compare_generation(sim, dataclasses.replace(got, ids=got.ids[:1])).explained


@pytest.mark.parametrize(
    ("given", "n", "match"),
    [
        ([], 4, "no tokens"),
        (prompt(P + 1), 4, f"{P + 1} tokens, the prompt graph takes {P}"),
        (prompt(4), N - 2, f"room for {N - 3}"),
        (prompt(4), 0, "n is 0"),
        (prompt(4), 2.0, r"n is 2\.0"),
        ([VOCAB], 4, f"token {VOCAB}"),
        ([-1], 4, "token -1"),
        ([0.5], 4, "float64"),
        (torch.zeros(2, 3, dtype=torch.long), 4, r"shape \(2, 3\)"),
        (7, 4, r"shape \(\)"),
        ("text", 4, "tokenizer=tokenizer"),
    ],
)
def test_what_does_not_fit_the_graphs_is_refused(generator, given, n, match) -> None:
    with pytest.raises(DataError, match=match):
        generator(given, n)


def test_what_is_no_such_folder_is_refused(exported, tmp_path) -> None:
    _, folder = exported
    with pytest.raises(DataError, match=r"manifest\.json"):
        generate_on_cpu(tmp_path, [1], 1)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "decode_qdq.onnx").unlink()
    with pytest.raises((DataError, IntegrityError), match=r"decode_qdq\.onnx"):
        generate_on_cpu(copy, [1], 1)
    shutil.copy(folder / "decode_qdq.onnx", copy)
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[0] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    with pytest.raises(IntegrityError, match=r"weights\.bin"):
        generate_on_cpu(copy, [1], 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["kind"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="export_generation"):
        generate_on_cpu(copy, [1], 1)


def test_a_missing_runtime_is_named_with_the_extra_that_brings_it(exported, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(MissingRuntimeError, match=r"onnxruntime-qnn.*aimet_quadapter\[deploy\]"):
        generate_on_htp(exported[1], [1], 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sim": object()}, SimError, "QuantizationSimModel"),
        ({"prompt_length": 0}, ValueError, "prompt_length is 0"),
        ({"cache_length": 8.0}, ValueError, r"cache_length is 8\.0"),
        ({"cache_length": P}, ValueError, f"longer than {P}"),
        ({"cache_length": 65}, ValueError, "at most 64"),
        ({"opset": 17}, ValueError, "21, 22, 23"),
        ({"tokenizer": "gpt2"}, DataError, "save_pretrained"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_folder(sim, tmp_path, change, error, match):
    arguments = {"sim": sim, "prompt_length": P, "cache_length": N} | change
    with pytest.raises(error, match=match):
        export_generation(arguments.pop("sim"), tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


def refused(sim: QuantizationSimModel, folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export_generation(sim, folder / "out", prompt_length=P, cache_length=N)
    assert not any(folder.iterdir())


def test_sims_that_are_not_ready_are_refused(sim, tmp_path, monkeypatch) -> None:
    fresh = decoder_sim(gpt2())
    refused(fresh, tmp_path, SimError, r"transformer\.wte.*compute_encodings")
    with monkeypatch.context() as m:
        m.setattr(sim.model.transformer.h[0].ln_1, "_quadapter_scales", [], raising=False)
        refused(sim, tmp_path, UnfoldedError, r"fold\(sim\)")


def test_a_cache_without_encoding_is_refused(tmp_path) -> None:
    sim = small_sim(llama)
    keep_module_sites(sim)
    refused(sim, tmp_path, CoverageError, r"keys of layer 0, made by .*rotary_k\.add")


def test_an_operation_without_encoding_is_refused(tmp_path) -> None:
    sim = small_sim(lambda: gpt2(layers=1))
    sim.model.transformer.h[0].attn.attention.softmax.output_quantizers[0] = None
    refused(sim, tmp_path, CoverageError, r"\(Softmax\)")


def test_a_model_that_computes_otherwise_with_a_cache_is_refused(
    sim, tmp_path, monkeypatch
) -> None:
    forward = type(sim.model).forward
    monkeypatch.setattr(
        type(sim.model),
        "forward",
        lambda self, ids, mask=None, positions=None, cache=None: forward(
            self, ids, mask, None if positions is None else 0 * positions, cache
        ),
    )
    refused(sim, tmp_path, SimError, "computes other logits")


def test_a_model_that_takes_no_cache_is_refused(tmp_path) -> None:
    model = nn.Linear(4, 4)
    sim = QuantizationSimModel(model, torch.zeros(1, 4))
    sim.compute_encodings(lambda m: m(torch.zeros(1, 4)))
    sim.model.dummy_input = lambda length=1: (torch.zeros(length, 4),)
    refused(sim, tmp_path, SimError, "takes no cache")


@pytest.mark.parametrize(
    ("name", "match"), [("bloom", "ALiBi"), ("mistral", "sliding window of 5")]
)
def test_a_cache_that_a_model_cannot_be_given_is_refused(name, match, tmp_path) -> None:
    refused(small_sim(families.FAMILIES[name]), tmp_path, UnsupportedModelError, match)


def test_an_earlier_export_is_replaced_only_when_told(exported, tmp_path, monkeypatch) -> None:
    sim, folder = exported
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_generation(sim, copy, prompt_length=P, cache_length=N)
    models = [onnx.load(folder / name) for name in ("prompt_qdq.onnx", "decode_qdq.onnx")]
    module = export_generation.__globals__
    monkeypatch.setitem(module, "_qdq", lambda *_: models.pop(0))  # all else as ever, and fast
    monkeypatch.setitem(module, "_describe_caches", lambda *_: [])
    monkeypatch.setitem(module, "make_caches_integer", lambda *_: None)
    again = export_generation(sim, copy, prompt_length=P, cache_length=N, overwrite=True)
    for name in ("prompt_qdq.onnx", "decode_qdq.onnx", "weights.bin"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((again / "manifest.json").read_text())["cache"] == []


class Wrong:
    """A session whose logits are off by one place of the vocabulary."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.get_outputs = session.get_outputs

    def run(self, *arguments: Any) -> list[np.ndarray]:
        logits, *rest = self.session.run(*arguments)
        return [np.roll(logits, 1, axis=-1), *rest]


def test_a_wrongly_compiled_graph_is_refused(exported, generator) -> None:
    folder, graphs = exported[1], generator.graphs
    prompt_session, decode_session = graphs.prompt, graphs.decode
    assert Generator(folder, prompt_session, decode_session).check(generator) == (0, 0)
    with pytest.raises(CompileError, match=r"prompt_qdq\.onnx.*something else"):
        Generator(folder, Wrong(prompt_session), decode_session).check(generator)
    with pytest.raises(CompileError, match=r"decode_qdq\.onnx.*something else"):
        Generator(folder, prompt_session, Wrong(decode_session)).check(generator)


@pytest.mark.deploy
def test_it_generates_on_the_htp(exported) -> None:
    """Positions by index, grouped queries, caches of 8 bits."""
    sim, folder = exported
    result = compare_generation(sim, generate_on_htp(folder, prompt(5), N - 4))
    print(f"tiny {folder.name}, W8A8, HTP: {result}")
    assert all(d.gap < 10 for d in result.differences)  # random weights: many near ties


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any, torch.Tensor]:
    model, tokenizer = load_default()
    ids = tokenizer(default_text("calibration")[:20_000], return_tensors="pt")["input_ids"][0]
    return model, tokenizer, ids[: 4 * 128].reshape(4, 1, 128)


@pytest.mark.parametrize(
    ("bits", "residual", "where"),
    [
        (8, 8, ["CPU"]),  # on the HTP 8 bits are its own arithmetic's: docs/generation.md
        pytest.param(8, 16, ["HTP"], marks=pytest.mark.deploy),
        pytest.param(16, 16, ["CPU", "HTP"], marks=pytest.mark.deploy),
    ],
)
def test_the_embedded_model_says_what_its_sim_says(
    embedded, tmp_path, bits, residual, where
) -> None:
    model, tokenizer, samples = embedded
    sim = QuantizationSimModel(
        prepare(model), samples[0], config_file="htp_v73", default_output_bw=bits
    )
    set_residual_bits(sim, residual)
    apply_quadapter(sim, samples, calibration=CalibrationConfig(steps=0))
    folder = export_generation(
        sim, tmp_path / "out", prompt_length=24, cache_length=48, tokenizer=tokenizer
    )
    caches = json.loads((folder / "manifest.json").read_text())["cache"]
    assert {c["dtype"] for c in caches} == {f"uint{bits}"}
    for name in where:
        generator = {"CPU": Generator.on_cpu, "HTP": Generator.on_htp}[name](folder)
        got = generator("def read(self, size=-1):\n    ", 24)
        assert len(got.ids) == 24
        assert got.text == tokenizer.decode(got.ids)
        result = compare_generation(sim, got)
        what = f"GPT-2 W8A{bits}, residual A{residual}, {name}"
        print(f"{what}, {got.seconds_per_token:.2f} s a token: {result}")
        assert says_what_the_sim_says(sim, got, bits)
