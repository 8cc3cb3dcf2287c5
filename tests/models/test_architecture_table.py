"""The table of docs/architectures.md: what each row promises, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from families import FAMILIES
from tiny import BLOCKS, simulate, tokens
from torch.testing import assert_close

from aimet_quadapter import (
    LogitsOnly,
    UnsupportedModelError,
    apply_quadapter,
    coverage,
    export,
    export_generation,
    find_pairs,
    prepare,
    set_ranges,
    verify,
)

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ROW = re.compile(r"^\| `(\w+)`[^|]*\| (\d+), (\d+), (\d+), (\d+)[^|]*\| (yes|no)[^|]*\|$", re.M)
KINDS = (("norm-linear",), ("norm-head",), ("up-down", "linear-relu-linear"), ("v-o",))
IN_FULL = ("gemma3", "llama")
"""Families of which the default run tries everything; the others are slow."""

# An HTP of 8 bits gets RMSNorms of heads below 64 channels wrong.
WIDE = {"head_dim": 64}
CHANGES: dict[str, dict[str, Any]] = {"gemma3": WIDE, "qwen3": WIDE, "qwen3_moe": WIDE}
LENGTH = 24

every = pytest.mark.parametrize("name", FAMILIES)
in_full = pytest.mark.parametrize(
    "name", [n if n in IN_FULL else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)


def rows() -> dict[str, tuple[tuple[int, ...], str]]:
    """HuggingFace's class → its numbers of pairs, and whether AIMET simulates it as it is."""
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {name: (tuple(map(int, counts)), stock) for name, *counts, stock in found}


def numbers(pairs: Any) -> tuple[int, ...]:
    counts = pairs.counts()
    return tuple(sum(counts.get(kind, 0) for kind in kinds) for kinds in KINDS)


def test_the_table_has_every_class() -> None:
    assert {type(families.model(name)).__name__ for name in FAMILIES} == rows().keys()
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"the {len(rows())} model classes that are known" in readme


@every
def test_pairs_and_encodings_are_those_of_the_table(name: str) -> None:
    hf = families.model(name)
    sim = simulate(prepare(hf), "htp_v73")
    set_ranges(sim, [tokens(2, LENGTH)])
    assert numbers(find_pairs(sim)) == rows()[type(hf).__name__][0]
    coverage(sim, strict=True)


@in_full
def test_a_stock_sim_has_the_same_pairs(name: str) -> None:
    hf = families.model(name)
    expected, stock = rows()[type(hf).__name__]
    if stock == "no":
        with pytest.raises(RuntimeError):  # AIMET knows not every module of it
            QuantizationSimModel(LogitsOnly(hf), tokens())
        return
    sim = QuantizationSimModel(LogitsOnly(hf), tokens())
    tied = hf.config.tie_word_embeddings
    got = numbers(find_pairs(sim, tokens()))
    if name == "qwen3_moe":  # its experts are stacked, and read by a function
        expected = (2, expected[1], 0, expected[3])
    assert got == (expected[0], 0 if tied else expected[1], *expected[2:])


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
@torch.no_grad()
def test_quadapter_on_a_stock_sim_leaves_the_unquantized_model_as_it_is(name: str) -> None:
    hf = families.model(name)
    expected = hf(tokens()).logits
    sim = QuantizationSimModel(LogitsOnly(hf), tokens())
    with torch.enable_grad():
        result = apply_quadapter(sim, [tokens(2, LENGTH)], calibration=BLOCKS)
    norms = [r for r in result.calibration.results if r.pair.kind == "norm-linear"]
    assert len(norms) == 4
    assert all((r.alpha != 1).any() for r in norms)
    with remove_all_quantizers(sim.model):
        assert_close(sim.model(tokens()), expected, atol=1e-4, rtol=0)


@in_full
@pytest.mark.parametrize("bits", [8, 16])
def test_it_exports_and_compiles_whole_for_the_htp(name: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="the HTP backend is not installed")
    model = prepare(FAMILIES[name](**CHANGES.get(name, {})))
    sim = QuantizationSimModel(
        model, model.dummy_input(), config_file="htp_v73", default_output_bw=bits
    )
    set_ranges(sim, [tokens(2, LENGTH), tokens(2, LENGTH, 1)])
    folder = export(sim, model.dummy_input(length=LENGTH), tmp_path / "whole")
    report = verify(folder, tokens(1, 4 * LENGTH, 5)[0], sim=sim, progress=False)
    checks = {check.name: check for check in report.checks}
    for check in ("encodings", "ONNX = torch, float", "QDQ on CPU = sim", "operations on HTP"):
        assert checks[check].ok, str(report)
    # How near the HTP's own arithmetic is, and with it which tokens tie, is not the table's.
    try:
        export_generation(sim, tmp_path / "generation", prompt_length=8, cache_length=16)
    except UnsupportedModelError as refused:
        assert re.search("ALiBi|sliding window of 5", str(refused))  # noqa: PT017


@in_full
def test_aimets_own_techniques_run_after_it(name: str) -> None:
    from aimet_torch.adascale import apply_adascale
    from aimet_torch.seq_mse import apply_seq_mse

    model = prepare(families.model(name))
    for technique in ("seq_mse", "adascale"):
        sim = QuantizationSimModel(model, model.dummy_input(), default_param_bw=4)
        batches = [tokens(2, LENGTH)]
        set_ranges(sim, batches)
        before = {n: q.get_max().clone() for n, q in sim.named_quantizers() if "param" in n}
        weights = {n: p.clone() for n, p in sim.model.named_parameters()}
        if technique == "seq_mse":
            apply_seq_mse(sim, batches, num_candidates=4)
        else:
            apply_adascale(sim, batches, num_iterations=2)
        changed = {
            n for n, q in sim.named_quantizers() if n in before and not before[n].equal(q.get_max())
        } | {n for n, p in sim.model.named_parameters() if n in weights and not weights[n].equal(p)}
        layers = model.description.parts["blocks"]
        for i in range(len(model.description.layers)):
            assert any(n.startswith(f"{layers}.{i}.") or f".{i}." in n for n in changed), technique
        with torch.no_grad():
            assert sim.model(tokens()).isfinite().all()
