"""Export: what is written, that it computes what the sim computes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from deployed import check_same_but_for_rounding, steps
from torch import nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from aimet_quadapter import default_text, export, load_default, prepare
from aimet_quadapter.artifacts.exported import (
    ExportReport,
    check_export,
    device_operations,
    encoding_names,
)
from aimet_quadapter.device.sessions import run_on_cpu
from aimet_quadapter.errors import CoverageError, DataError, SimError, UnfoldedError
from aimet_quadapter.exporting import onnx_files
from aimet_quadapter.exporting.whole_model import write_text_files
from aimet_quadapter.models.attention import MASK_VALUE

VOCABULARY, LENGTH = 300, 16


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at birth: then int32 biases would go untested
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def tokens(samples: int = 4, length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (samples, length), generator=generator)


def build_sim(model: PreTrainedModel, *inputs: torch.Tensor, **settings: object):
    prepared = prepare(model)
    first = tuple(x[:1] for x in inputs)
    sim = QuantizationSimModel(prepared, first, **({"config_file": "htp_v73"} | settings))
    with torch.no_grad():
        sim.compute_encodings(lambda m: m(*inputs))
    return sim


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A tiny random model (linear weights per channel), its sim and its export."""
    sim = build_sim(MODELS[request.param](), tokens())
    folder = tmp_path_factory.mktemp("export") / request.param
    before = {k: v.clone() for k, v in sim.model.state_dict().items() if torch.is_tensor(v)}
    export(sim, tokens(1), folder, pairs=["a→b"], perplexities={"FP32": 29.3})
    after = sim.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # the sim is not changed
    return sim, folder


@pytest.fixture(scope="module")
def sim() -> QuantizationSimModel:
    return build_sim(tiny_gpt2(), tokens())


def test_the_qdq_file_gives_the_sims_logits(exported) -> None:
    sim, folder = exported
    for sample in (tokens(1), tokens(2)[1:]):
        check_same_but_for_rounding(steps(run_on_cpu(folder, sample), sim, sample))


def test_every_encoding_names_a_tensor_and_every_device_operation_has_one(exported) -> None:
    report = check_export(exported[1])
    assert report.ok, str(report)
    # GPT-2: embedding sum, 2 × (2 norms, 4 Linears, 5 of attention, GELU, 2 sums), norm, head.
    # Llama: 1 × (2 norms, 7 Linears, 2 × 3 rotary, 5 of attention, 2 SiLU, product, 2 sums), ….
    expected = {"gpt2": 1 + 2 * 14 + 2, "llama": 25 + 2}[exported[1].name]
    assert report.operations == {"model.onnx": expected, "model_qdq.onnx": expected}


def test_every_linear_weight_has_an_encoding_per_channel(exported) -> None:
    model = onnx.load(exported[1] / "model.onnx", load_external_data=False)
    encodings = json.loads((exported[1] / "model.encodings").read_text())
    scales = {e["name"]: len(e["scale"]) for e in encodings["param_encodings"]}
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    weights = [
        n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in shapes
    ]
    assert len(weights) == {"gpt2": 2 * 4 + 1, "llama": 7 + 1}[exported[1].name]  # and the head
    assert {name: scales[name] for name in weights} == {n: shapes[n][1] for n in weights}


def test_the_manifest_describes_the_files(exported) -> None:
    _, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "model.onnx",
        "model.encodings",
        "model_qdq.onnx",
        "reference.safetensors",
        "config.json",
        "manifest.json",
    }
    assert set(manifest["files"]) == files - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert manifest["inputs"] == [{"name": "input_ids", "shape": [1, LENGTH], "dtype": "int64"}]
    assert manifest["pairs"] == ["a→b"]
    assert manifest["perplexities"] == {"FP32": 29.3}
    assert set(manifest["versions"]) >= {"aimet-torch", "torch", "onnx", "aimet_quadapter"}
    assert "8 bits per channel" in manifest["quantizers"]["weight"]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY


def test_the_files_hold_no_paths_of_this_machine(exported) -> None:
    root = str(Path(torch.__file__).parents[1]).encode()
    assert not [p.name for p in exported[1].iterdir() if root in p.read_bytes()]


def test_per_tensor_weights_all_inputs_and_another_schema(tmp_path) -> None:
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    hidden[:, :3] = True  # padding
    mask = torch.zeros(4, 1, LENGTH, LENGTH).masked_fill(hidden, MASK_VALUE)
    inputs = (tokens(), mask, (torch.arange(LENGTH) - 3).clamp(min=0).repeat(4, 1))
    for name, build in MODELS.items():
        sim = build_sim(build(), *inputs, config_file="default")
        one = tuple(x[:1] for x in inputs)
        folder = export(sim, one, tmp_path / name, encoding_version="2.0.0")
        assert check_export(folder).ok
        graph = onnx.load(folder / "model_qdq.onnx", load_external_data=False).graph
        assert "GatherND" not in {n.op_type for n in graph.node}, "the HTP library crashes on it"
        names = ("input_ids", "attention_mask", "position_ids")
        result = run_on_cpu(folder, dict(zip(names, one, strict=True)))
        check_same_but_for_rounding(steps(result, sim, *one))


@pytest.fixture
def copied(exported, monkeypatch) -> Path:
    """Let `export` take the ONNX files of the earlier export: all else is as ever, and fast."""
    _, folder = exported

    def write_onnx(*arguments: object, **_: object) -> None:
        for file in arguments:
            if isinstance(file, Path):
                shutil.copy(folder / file.name, file)

    def qdq_model(*_: object, **__: object) -> onnx.ModelProto:
        return onnx.load(folder / "model_qdq.onnx")

    monkeypatch.setitem(export.__globals__, "write_onnx", write_onnx)
    monkeypatch.setitem(export.__globals__, "qdq_model", qdq_model)
    return folder


def test_an_earlier_export_is_replaced_only_when_told(sim, copied, tmp_path) -> None:
    folder = export(sim, tokens(1), tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(sim, tokens(1), folder)
    assert export(sim, tokens(1), folder, pairs=["new"], overwrite=True) == folder
    assert json.loads((folder / "manifest.json").read_text())["pairs"] == ["new"]
    assert check_export(folder).ok
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        export(sim, tokens(1), folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "keep me"


def test_the_same_sim_gives_the_same_files(exported, tmp_path) -> None:
    sim, folder = exported
    about = {"pairs": ["a→b"], "perplexities": {"FP32": 29.3}}
    again = export(sim, tokens(1), tmp_path / "out", **about)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_graph_is_traced_once_and_the_files_are_those_of_two_traces(
    exported, tmp_path, monkeypatch
) -> None:
    sim, folder = exported
    about = {"pairs": ["a→b"], "perplexities": {"FP32": 29.3}}
    traced = []
    trace = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **s: traced.append(s) or trace(*a, **s))
    once = export(sim, tokens(1), tmp_path / "once", **about)
    assert len(traced) == 1
    monkeypatch.setitem(export.__globals__, "traced_once", lambda *_: nullcontext())
    twice = export(sim, tokens(1), tmp_path / "twice", **about)
    assert len(traced) == 3
    for file in folder.iterdir():
        assert (once / file.name).read_bytes() == (twice / file.name).read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "twice"]


def test_large_models_keep_their_weights_beside_the_file(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_ABOVE", 1000)
    _, folder = exported
    onnx_files.save(onnx.load(folder / "model_qdq.onnx"), tmp_path / "model_qdq.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model_qdq.onnx", "model_qdq.onnx.data"}
    assert np.array_equal(run_on_cpu(tmp_path, tokens(1)), run_on_cpu(folder, tokens(1)))


def test_check_finds_what_is_wrong(exported, tmp_path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    encodings = json.loads((folder / "model.encodings").read_text())
    model = onnx.load(folder / "model.onnx")
    node, output = next(x for x in device_operations(model) if x[0].op_type == "Softmax")
    for entry in encodings["activation_encodings"]:
        if entry["name"] == output:
            entry["name"] = "nowhere"
    (folder / "model.encodings").write_text(json.dumps(encodings))
    report = check_export(folder)
    assert not report.ok
    assert report.missing == (f"model.onnx: {node.name} (Softmax)",)
    assert report.unknown == ("nowhere",)
    assert report.changed == ("model.encodings",)
    assert "nowhere" in str(report)
    (folder / "model_qdq.onnx").unlink()
    with pytest.raises(DataError, match=r"model_qdq\.onnx"):
        check_export(folder)


def test_an_operation_without_encoding_is_refused_by_name(tmp_path) -> None:
    sim = build_sim(tiny_gpt2(), tokens())
    sim.model.transformer.h[1].attn.attention.softmax.output_quantizers[0] = None
    with pytest.raises(CoverageError, match=r"\(Softmax\)"):
        export(sim, tokens(1), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_not_strict_notes_it_in_the_manifest(sim, copied, tmp_path, monkeypatch) -> None:
    report = ExportReport({"model.onnx": 2}, ("model.onnx: node (Softmax)",), (), ())
    monkeypatch.setitem(export.__globals__, "check_export", lambda *_: report)
    with pytest.raises(CoverageError, match="strict=False"):
        export(sim, tokens(1), tmp_path / "out")
    folder = export(sim, tokens(1), tmp_path / "out", strict=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["operations_without_encoding"] == ["model.onnx: node (Softmax)"]


def test_an_attached_alpha_is_refused(sim, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sim.model.transformer.h[0].ln_1, "_quadapter_scales", [], raising=False)
    with pytest.raises(UnfoldedError, match=r"transformer\.h\.0\.ln_1.*fold\(sim\)"):
        export(sim, tokens(1), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_quantizers_without_range_are_refused_by_name(tmp_path) -> None:
    fresh = QuantizationSimModel(prepare(tiny_gpt2()), tokens(1), config_file="default")
    with pytest.raises(SimError, match=r"transformer\.wte.*compute_encodings"):
        export(fresh, tokens(1), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_quantizer_that_no_input_reaches_needs_no_range(copied, tmp_path) -> None:
    sim = build_sim(tiny_gpt2(), tokens())
    fresh = QuantizationSimModel(prepare(tiny_gpt2()), tokens(1), config_file="default")
    sim.model.unused = fresh.model.lm_head
    assert check_export(export(sim, tokens(1), tmp_path / "out")).ok


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sim": object()}, SimError, "QuantizationSimModel"),
        ({"dummy_input": ()}, DataError, "0 inputs"),
        ({"dummy_input": [[1, 2, 3]]}, DataError, "input_ids is a list"),
        ({"dummy_input": torch.full((1, 8), VOCABULARY)}, DataError, "does not run"),
        ({"encoding_version": "3.0"}, ValueError, "0.6.1, 1.0.0, 2.0.0"),
        ({"opset": 17}, ValueError, "21, 22, 23"),
        ({"perplexities": {"FP32": float("nan")}}, ValueError, "positive number"),
        ({"tokenizer": "gpt2"}, DataError, "save_pretrained"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_folder(sim, tmp_path, change, error, match):
    arguments = {"sim": sim, "dummy_input": tokens(1)} | change
    with pytest.raises(error, match=match):
        export(arguments.pop("sim"), folder=tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path) -> None:
    sim = build_sim(tiny_gpt2().bfloat16(), tokens())
    with pytest.raises(SimError, match="float32"):
        export(sim, tokens(1), tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 5, 12, 32])
def test_bits_that_no_file_holds_are_refused(tmp_path, bits) -> None:
    sim = build_sim(tiny_gpt2(), tokens())
    sim.model.lm_head.param_quantizers["weight"].bitwidth = bits
    sim.model.lm_head.param_quantizers["weight"].symmetric = False
    with pytest.raises(SimError, match=rf"weight has {bits} bits: files hold 4, 8, 16, and 32"):
        export(sim, tokens(1), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "set_blocks",
    [
        set_blockwise_quantization_for_weights,
        partial(
            set_grouped_blockwise_quantization_for_weights, decompressed_bw=8, block_grouping=-1
        ),
    ],
    ids=["block", "grouped block"],
)
def test_a_block_as_long_as_a_row_is_refused(tmp_path, set_blocks) -> None:
    sim = build_sim(tiny_gpt2(), tokens())
    linear = sim.model.transformer.h[0].attn.c_attn
    set_blocks(sim, [linear], bitwidth=4, symmetric=True, block_size=linear.in_features)
    sim.compute_encodings(lambda m: m(tokens()))
    with pytest.raises(SimError, match=r"c_attn.*has blocks as long as a row \(\[1, 64\]\)"):
        export(sim, tokens(1), tmp_path / "out")


def test_a_failure_half_way_leaves_nothing(sim, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("aimet_torch.onnx.export", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export(sim, tokens(1), tmp_path / "deep" / "out")
    assert not any((tmp_path / "deep").iterdir())


def test_encoding_names_of_every_schema() -> None:
    entry = {"name": "x"}
    assert encoding_names({"encodings": [entry]}) == {"x"}
    assert encoding_names({"activation_encodings": [entry], "param_encodings": []}) == {"x"}
    assert encoding_names({"activation_encodings": {"x": []}, "param_encodings": {}}) == {"x"}


def test_the_embedded_models_file_gives_the_sims_logits(tmp_path) -> None:
    model, tokenizer = load_default()
    text = tokenizer(default_text("calibration")[:20_000], return_tensors="pt")["input_ids"][0]
    ids = text[:256].reshape(4, 64)
    sim = build_sim(model, ids)
    folder = export(sim, ids[:1], tmp_path / "out", tokenizer=tokenizer)
    check_same_but_for_rounding(steps(run_on_cpu(folder, ids[:1]), sim, ids[:1]))
    assert AutoTokenizer.from_pretrained(folder).encode("def f(") == tokenizer.encode("def f(")


def test_a_model_of_two_outputs_is_exported_with_both(tmp_path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    sim = QuantizationSimModel(Two().eval(), (x,))
    sim.compute_encodings(lambda model: model(x))
    folder = export(sim, x, tmp_path / "out", strict=False)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [y.name for y in model.graph.output] == ["logits", "output_1"]
    expected = sim.model(x)[0].detach().numpy()
    step = float(sim.model.a.output_quantizers[0].get_scale().detach())
    assert np.abs(run_on_cpu(folder, x) - expected).max() <= 1.01 * step


def test_the_config_says_tied_only_while_the_head_is_the_embedding(tmp_path) -> None:
    model = prepare(tiny_gpt2())

    def says_tied() -> bool:
        write_text_files(model, None, tmp_path)
        return json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]

    assert says_tied()
    with torch.no_grad():
        model.lm_head.weight[:, 0] *= 2  # as α of the last norm does
    assert not says_tied()
    assert model.config.tie_word_embeddings
