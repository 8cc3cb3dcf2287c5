"""What a run says before its work: the estimate, what is refused, that nothing is written."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from tiny import one_layer_gpt2, saved
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from aimet_quadapter import DataError, load_default
from aimet_quadapter.cli import estimate, machine, main
from aimet_quadapter.cli.estimate import Estimate, Need, Resumed, beside, duration
from aimet_quadapter.cli.machine import Memory, existing, free_disk, in_words, size_of

QUICK = ["--samples", "2", "--length", "32", "--eval-tokens", "128", "--steps", "2"]
QUICK += ["--device", "cpu"]
MB = 1 << 20


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(one_layer_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, tokenizer = load_default()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads))
    return saved(model, tmp_path_factory.mktemp("llama"))


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in found}


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["run", str(gpt2), *QUICK, "--dry-run", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "3 pairs: 2 norm-linear, 1 norm-head" in printed.out
    for line in ("time         about", "memory       about", f"in {output};"):
        assert line in printed.out
    assert "\nPTQ " not in printed.out
    assert "comparing" not in printed.err  # its own loops say nothing
    assert list(tmp_path.iterdir()) == []

    target = tmp_path / "folded"
    assert main(["fold", str(gpt2), *QUICK, "--dry-run", "-o", str(target)]) == 0
    assert f"in {target};" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rms_norm", [False, True])
def test_a_run_records_what_was_estimated_beside_what_it_took(
    rms_norm: bool, gpt2: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage by stage, each under the same name; then the same command resumes."""
    stages = ["--compensate-softmax", "--choose-ranges", "--assign-bits", "1", "--phase-2"]
    stages += ["--finetune-steps", "2"]
    chosen = ["--prefix", "5", "--no-export"] if rms_norm else ["--save-huggingface"]
    command = ["run", str(llama if rms_norm else gpt2), *QUICK, *stages, *chosen]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = result_of(tmp_path / "out")
    estimated, took = result["estimated"], result["seconds"]
    assert list(estimated["seconds"]) == [s for s in took if s not in ("load", "preflight")]
    assert all(value >= 0 for value in estimated["seconds"].values())
    assert estimated["seconds"]["quadapter"] > 0
    assert f"{'stage':<32}{'estimated':>12}{'took':>10}" in printed
    assert estimated["may_be_resumed"] == ""
    assert (
        result["disk_bytes"]
        == size_of(tmp_path / "out") - (tmp_path / "out" / "result.json").stat().st_size
    )
    assert result["peak_bytes"] >= estimated["peak_bytes"] / 2

    before = files(tmp_path)
    assert main([c for c in command if c != "--save-huggingface"] + ["--dry-run"]) == 0
    printed = capsys.readouterr().out
    pairs = 5 if rms_norm else 3
    assert f"{tmp_path}/out/checkpoints holds {pairs} of {pairs} blocks" in printed
    assert "trials of the choice, 2 steps of phase 2: about" in printed
    assert files(tmp_path) == before


def test_both_sims_of_a_chosen_rotation_are_in_the_estimate(llama: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("auto", "hadamard"):
        output = tmp_path / kind
        command = ["run", str(llama), *QUICK, "--prefix", "none", "--no-export", "--no-report"]
        assert main([*command, "--rotate", kind, "--output", str(output)]) == 0
        found[kind] = result_of(output)
    estimated = {k: r["estimated"]["seconds"]["prefix and rotation"] for k, r in found.items()}
    took = {k: r["seconds"]["prefix and rotation"] for k, r in found.items()}
    assert estimated["auto"] > 5 * estimated["hadamard"]
    assert took["auto"] / 4 < estimated["auto"] < took["auto"] * 4


def test_experts_that_one_sample_does_not_run_are_found_on_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load_default()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, **experts))
    path = saved(model, tmp_path / "mixtral")
    command = ["run", str(path), "--samples", "30", "--length", "4", "--eval-tokens", "16"]
    command += ["--steps", "1", "--device", "cpu", "--prefix", "none", "--rotate", "none"]
    assert main([*command, "--dry-run", "--output", str(tmp_path / "out")]) == 0
    assert "8 up-down" in capsys.readouterr().out


def test_an_estimate_changes_no_number(gpt2: Path, tmp_path: Path) -> None:
    command = ["run", str(gpt2), *QUICK, "--no-export", "--compensate-softmax"]
    for name, more in (("with", []), ("without", ["--no-preflight"])):
        assert main([*command, *more, "--output", str(tmp_path / name)]) == 0
    with_it, without = (result_of(tmp_path / name) for name in ("with", "without"))
    assert with_it["perplexity"] == without["perplexity"]
    assert "estimated" in with_it
    assert "estimated" not in without


def test_too_little_disk_is_said_before_the_work(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_disk", lambda _: 1000)
    output = tmp_path / "out"
    assert main(["run", str(gpt2), *QUICK, "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert f"of disk in {output} and 1 KiB are free" in " ".join(printed.err.split())
    assert "--no-export" in printed.err
    assert "\nPTQ " not in printed.out
    assert not output.exists()


def test_each_process_of_a_machine_has_its_own_copies_of_the_weights(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(estimate, "in_words", str)
    for processes in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        command = ["run", str(gpt2), *QUICK, "--dry-run", "--output", str(tmp_path / "out")]
        assert main(command) == 0
        copies = rf"disk +(\d+) for a while in {gettempdir()};"
        found += map(int, re.findall(copies, capsys.readouterr().out))
    alone, of_four = found
    assert of_four == 4 * alone > 0


def test_too_little_memory_is_said_before_the_work(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = ["run", str(gpt2), *QUICK, "--output", str(output)]
    for free, said in ((10, "the sim needs"), (MB, "more memory (")):
        monkeypatch.setattr(Memory, "free", free)
        monkeypatch.setattr(Memory, "most", 1 << 40)
        assert main(command) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert f"{in_words(free)} are free" in printed.err
        assert not output.exists()
    for word in ("--samples", "--length", "capture_bytes", "--no-export", "--no-preflight"):
        assert word in printed.err


def test_an_estimate_in_words() -> None:
    need = Need(Path("/"), 3 * MB, 2 * MB, "Give another --output.")
    resumed = Resumed("checkpoints holds 2 of 4 blocks", 100.0)
    seconds = {"quantize": 20.0, "quadapter": 280.0}
    found = Estimate(
        {"v-o": 3, "up-down": 1},
        seconds,
        4 << 30,
        "quadapter",
        1 << 30,
        3 << 30,
        (need,),
        resumed,
        2.0,
    )
    assert str(found).splitlines()[:4] == [
        "preflight    2 s; 4 pairs: 3 v-o, 1 up-down",
        "time         about 5 min: quantize 20 s, quadapter 280 s",
        "to resume    checkpoints holds 2 of 4 blocks: about 3 min where they fit these settings",
        "memory       about 4.0 GiB (quadapter), of it 1.0 GiB now; 3.0 GiB free",
    ]
    found.check()
    assert duration(99) == "99 s"
    assert duration(2 * 3600) == "2.0 h"
    table = beside({"a": 1.0}, {"load": 3.0, "a": 2.0}).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["load", "3.0", "s"],
        ["a", "1.0", "s", "2.0", "s"],
    ]


def test_memory_is_seen_while_it_is_used() -> None:
    memory = Memory(torch.device("cpu"))
    with memory.watched() as peak:
        x = torch.ones(256 * MB // 4)
        time.sleep(0.3)  # it is looked at now and then
        del x
    assert 250 * MB < peak.above < 400 * MB
    assert memory.most >= peak.most > memory.used
    assert memory.free > 0


def test_the_limit_of_a_container_is_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "groups" / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/a/b\n", encoding="utf-8")
    for place, limit in ((group, "max"), (group.parent, "5000000")):
        (place / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
        (place / "memory.current").write_text("4000000\n", encoding="utf-8")
        (place / "memory.stat").write_text("anon 1\ninactive_file 500\n", encoding="utf-8")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    assert Memory(torch.device("cpu")).free == 1_000_500


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert free_disk(tmp_path / "a") > 0
    with pytest.raises(DataError, match=r"2\.0 GiB of disk in /proc/none"):
        Estimate(
            {}, {}, 0, "", 0, 1, (Need(Path("/proc/none"), 2 << 30, 0, "x"),), Resumed(), 0
        ).check()
