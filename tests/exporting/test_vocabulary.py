"""Files whose tables are written by parts of their rows are the files that are written at once."""

from __future__ import annotations

import logging

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from families import FAMILIES
from tiny import tokens
from torch import nn

from aimet_quadapter import export, export_generation, prepare, set_ranges
from aimet_quadapter.exporting import vocabulary

BLOCKS = {
    "per channel": None,
    "4 bits": None,
    "blocks": set_blockwise_quantization_for_weights,
    "LPBQ": set_grouped_blockwise_quantization_for_weights,
}


def _sim(family: str, weights: str = "per channel"):
    model = prepare(FAMILIES[family]())
    bits = 4 if weights == "4 bits" else 8
    sim = QuantizationSimModel(
        model, model.dummy_input(), default_param_bw=bits, config_file="htp_v73", in_place=True
    )
    if BLOCKS[weights] is not None:
        more = {"decompressed_bw": 8, "block_grouping": -1} if weights == "LPBQ" else {}
        BLOCKS[weights](sim, [model.lm_head], bitwidth=4, symmetric=True, block_size=16, **more)
    set_ranges(sim, [tokens(1)])
    return sim


def _by_parts(monkeypatch, rows: int = 50) -> list[str]:
    """Let every table be large; the names of the modules that are written as tables."""
    monkeypatch.setattr(vocabulary, "LARGE", 1)
    monkeypatch.setattr(vocabulary, "PART", rows * 32)
    monkeypatch.setattr(vocabulary, "FEW", 13)
    written: list[str] = []
    write_table = vocabulary._write_table

    def noted(module, name, *rest) -> None:
        written.append(name)
        write_table(module, name, *rest)

    monkeypatch.setattr(vocabulary, "_write_table", noted)
    return written


def _same_files(a, b) -> None:
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("family", "weights", "settings"),
    [
        ("gptj", "4 bits", {"encoding_version": "0.6.1", "opset": 21}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("gemma3", "per channel", {}),
                ("llama", "LPBQ", {}),
                ("llama", "LPBQ", {"encoding_version": "2.0.0"}),
                ("opt", "blocks", {"encoding_version": "0.6.1", "opset": 21}),
                ("opt", "blocks", {"encoding_version": "2.0.0"}),
            )
        ),
    ],
)
def test_files_are_those_written_at_once(family, weights, settings, tmp_path, monkeypatch) -> None:
    sim = _sim(family, weights)
    whole = export(sim, tokens(1), tmp_path / "whole", **settings)
    modules = list(sim.model.named_modules())
    written = _by_parts(monkeypatch)
    parts = export(sim, tokens(1), tmp_path / "parts", **settings)
    assert written.count("lm_head") == 2
    assert len(written) == 4
    assert list(sim.model.named_modules()) == modules
    _same_files(whole, parts)


@pytest.mark.slow
def test_so_are_those_of_generation(tmp_path, monkeypatch) -> None:
    sim = _sim("llama")
    lengths = {"prompt_length": 4, "cache_length": 16}
    whole = export_generation(sim, tmp_path / "whole", **lengths)
    written = _by_parts(monkeypatch)
    parts = export_generation(sim, tmp_path / "parts", **lengths)
    assert len(written) == 4
    _same_files(whole, parts)


def test_a_model_that_cannot_be_cut_is_written_at_once(tmp_path, monkeypatch, caplog) -> None:
    sim = _sim(
        "gpt2"
    )  # its queries, keys and values have together as many rows as there are logits
    assert sim.model.transformer.h[0].attn.c_attn.out_features == sim.model.config.vocab_size
    whole = export(sim, tokens(1), tmp_path / "whole")
    written = _by_parts(monkeypatch)
    with caplog.at_level(logging.WARNING, "aimet_quadapter"):
        parts = export(sim, tokens(1), tmp_path / "parts")
    assert written == []
    assert "does not run with few rows" in caplog.text
    _same_files(whole, parts)


class _Ends(nn.Module):
    """A head alone, and what a deployment may put behind it."""

    def __init__(self, end) -> None:
        super().__init__()
        self.head = nn.Linear(8, 96)
        self.end = end

    def forward(self, x):
        return self.end(self.head(x))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (nn.Softmax(-1), "do not give the first logits"),
        (lambda y: y * torch.arange(y.shape[-1]), "knows how many rows"),
    ],
)
def test_what_knows_all_rows_is_found(end, reason, tmp_path, monkeypatch, caplog) -> None:
    model = _Ends(end).eval()
    written = _by_parts(monkeypatch)

    def write(module, inputs, file) -> None:
        torch.onnx.export(module, inputs, str(file), dynamo=True, verbose=False)

    graph = vocabulary.write_by_parts(model, (torch.randn(1, 3, 8),), tmp_path / "m.onnx", write)
    assert written == []
    assert reason in caplog.text
    assert [d.dim_value for d in graph.graph.output[0].type.tensor_type.shape.dim] == [1, 3, 96]


@pytest.mark.parametrize(
    ("few", "parts", "whole"),
    [
        ([1] * 13, [[1] * 20, [1] * 5], [1] * 25),
        (
            [*range(13), *range(50, 63)],
            [[*range(20), *range(50, 70)], [*range(20, 25), *range(70, 75)]],
            [*range(25), *range(50, 75)],
        ),
        ({"a": [[0] * 13], "b": 4}, [{"a": [[0] * 20], "b": 4}] * 2, {"a": [[0] * 40], "b": 4}),
    ],
)
def test_lists_of_rows_are_joined(few, parts, whole, monkeypatch) -> None:
    monkeypatch.setattr(vocabulary, "FEW", 13)
    assert vocabulary._joined(few, parts) == whole


def test_encodings_that_differ_are_not_joined() -> None:
    with pytest.raises(vocabulary._UnlikeError):
        vocabulary._joined({"scale": [0.1]}, [{"scale": [0.1]}, {"scale": [0.2]}])
