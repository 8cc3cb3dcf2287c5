"""Phase 1 on a model whose weights are pages of its checkpoint."""

from __future__ import annotations

import hashlib
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from tiny import BLOCKS, assert_same, batches, llama, state
from torch import nn
from transformers import AutoModelForCausalLM

from aimet_quadapter import calibrate, find_pairs, fold, prepare
from aimet_quadapter.learning import blocks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HALVES = [torch.bfloat16, torch.float16]
FEW = replace(BLOCKS, steps=4, evaluate_every=2)


@pytest.fixture(params=[torch.float32, *HALVES], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama with an outlier channel, in several files."""
    model = llama(1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] *= 100.0
    model.to(request.param).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    return tmp_path


def sim_of(folder: Path, mapped: bool) -> Any:
    """The sim of a checkpoint, its weights left there or copied into memory."""
    model = prepare(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), share=mapped)
    return QuantizationSimModel(model, model.dummy_input(), in_place=True)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def mappings(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Begin and end of each mapping of a file there, and bytes of it that are not the file's."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M):
        if str(folder) in part:
            begin, end = (int(x, 16) for x in part.split()[0].split("-"))
            yield begin, end, 1024 * int(re.findall(r"^Anonymous: +(\d+)", part, re.M)[0])


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "_quantizers" not in n}


def assert_on_disk(folder: Path, model: nn.Module) -> None:
    """Every weight is in a mapping of the checkpoint, to which nothing was written."""
    found = list(mappings(folder))
    for name, weight in weights(model).items():
        assert any(begin <= weight.data_ptr() < end for begin, end, _ in found), name
    assert sum(changed for *_, changed in found) == 0


@pytest.mark.parametrize("mapped", [True, False])
def test_weights_stay_where_they_are(checkpoint: Path, mapped: bool) -> None:
    sim = sim_of(checkpoint, mapped)
    calibrate(sim, batches(), config=FEW)
    if mapped:
        assert_on_disk(checkpoint, sim.model)
    else:
        with pytest.raises(AssertionError):
            assert_on_disk(checkpoint, sim.model)


@pytest.mark.parametrize("config", [FEW, replace(FEW, objective="layer")])
def test_alpha_is_that_of_the_model_in_memory(checkpoint: Path, config: Any) -> None:
    before = hashes(checkpoint)
    found = {}
    for mapped in (True, False):
        sim = sim_of(checkpoint, mapped)
        dtypes = {n: p.dtype for n, p in weights(sim.model).items()}
        kept = state(sim)
        result = calibrate(sim, batches(), config=config)
        assert_same(sim, kept)
        assert {n: p.dtype for n, p in weights(sim.model).items()} == dtypes
        assert {alpha.dtype for alpha in result.alphas.values()} == {torch.float32}
        found[mapped] = result
    assert found[True].alphas.keys() == found[False].alphas.keys()
    for name, alpha in found[True].alphas.items():
        assert torch.equal(alpha, found[False].alphas[name])
    assert [r.losses for r in found[True].results] == [r.losses for r in found[False].results]
    assert hashes(checkpoint) == before


def test_trials_of_the_choice_give_the_same(tmp_path: Path) -> None:
    """They fold: into memory, which has then what is not the files'."""
    llama(1).save_pretrained(tmp_path)
    before = hashes(tmp_path)
    sims = [sim_of(tmp_path, mapped) for mapped in (True, False)]
    pairs = [find_pairs(sim, kinds=["norm-linear"]) for sim in sims]
    config = replace(FEW, steps=1, choice="kind")
    found = [calibrate(s, batches(), p, config) for s, p in zip(sims, pairs, strict=True)]
    assert found[0].choice is not None
    assert replace(found[0].choice, seconds=0) == replace(found[1].choice, seconds=0)
    assert_same(sims[0], state(sims[1]))
    assert any(changed for *_, changed in mappings(tmp_path))
    assert hashes(tmp_path) == before


def test_fold_writes_into_memory_alone(checkpoint: Path) -> None:
    before = hashes(checkpoint)
    folded = []
    for mapped in (True, False):
        sim = sim_of(checkpoint, mapped)
        pairs = find_pairs(sim)
        fold(sim, pairs, calibrate(sim, batches(), pairs, FEW).alphas)
        folded.append({n: p.detach().clone() for n, p in weights(sim.model).items()})
    assert folded[0].keys() == folded[1].keys()
    assert all(torch.equal(value, folded[1][name]) for name, value in folded[0].items())
    again = weights(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"))
    assert any(not torch.equal(value, again[name]) for name, value in folded[0].items())
    assert hashes(checkpoint) == before


def test_joined_inputs_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = QuantizationSimModel(model := prepare(llama(3)), model.dummy_input())
    build, joined, alive = blocks._block, [], []

    def see(model: nn.Module, pair: Any, runs: list[blocks.Run]) -> blocks.Block:
        alive.append(sum(ref() is not None for ref in joined))
        joined.extend(weakref.ref(x) for run in runs for x in run.inputs.values())
        return build(model, pair, runs)

    monkeypatch.setattr(blocks, "_block", see)
    calibrate(sim, batches(), find_pairs(sim, kinds=["up-down"]), FEW)
    assert len(joined) > len(alive) == 3
    assert alive == [0, 0, 0]
