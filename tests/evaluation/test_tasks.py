"""Scores of tasks: what lm-evaluation-harness finds by itself, of any model of ours."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aimet_torch import QuantizationSimModel
from deployed import embedded
from task_files import ITEMS, write_tasks
from tiny import gpt2, llama, simulate
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import (
    CpuSession,
    DataError,
    MissingRuntimeError,
    default_text,
    evaluate_tasks,
    export,
    load_default,
    prepare,
    set_prefix,
    set_ranges,
)
from aimet_quadapter.evaluation.causal_lm import CausalLM
from aimet_quadapter.evaluation.task_scores import Flips, TaskScores, scores_of

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from aimet_quadapter.evaluation.harness import Beside, HarnessModel

POSITIONS = 64
BUILDS = {"gpt2": gpt2, "llama": llama}
LONG = default_text("heldout")[:1200]  # more tokens than there are positions
PAIRS = [(q, c) for q, choices, _ in ITEMS for c in choices] + [("", " the cat"), (LONG, " end")]
QUESTIONS = [question for question, _, _ in ITEMS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_default()[1]


@pytest.fixture
def with_bos(tokenizer: Any) -> Any:
    """The embedded tokenizer with a rule like Llama's: BOS before every text."""
    found = copy.deepcopy(tokenizer)
    found.bos_token = begin = found.eos_token
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, found.eos_token_id)]
    )
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_tasks(tmp_path / "tasks")


def build(name: str, tokenizer: Any, **changes: Any) -> Any:
    """A small random model with the tokenizer's vocabulary, sure enough of itself to choose."""
    model = BUILDS[name](vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 3
    return model


def quantized(model: Any) -> QuantizationSimModel:
    sim = simulate(model, "htp_v73")
    set_ranges(sim, [torch.randint(3, 90, (2, 24))])
    return sim


def ask(model: Any, tokenizer: Any, pairs: Any, kind: str, **settings: Any) -> Any:
    """Answers of a `HarnessModel`, or of the harness's own `HFLM`, to requests."""
    lm = model
    if not isinstance(model, HFLM):
        given = CausalLM(model, tokenizer.eos_token_id)
        window = settings.pop("window", None) or given.room
        lm = HarnessModel(given, tokenizer, window, show=False, **settings)
    requests = [Instance(kind, {}, pair, 0, ("task", i, 1)) for i, pair in enumerate(pairs)]
    return getattr(lm, kind)(requests, disable_tqdm=True), lm


def theirs(hf: Any, tokenizer: Any, **settings: Any) -> HFLM:
    return HFLM(pretrained=hf, tokenizer=copy.deepcopy(tokenizer), **settings)


def assert_same_answers(found: list[Any], expected: list[Any], tolerance: float = 1e-4) -> None:
    assert_close(
        torch.tensor([x for x, _ in found]),
        torch.tensor([x for x, _ in expected]),
        atol=tolerance,
        rtol=0,
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


class Bare(nn.Module):
    """Token ids → logits, with neither a mask nor positions nor a config of HuggingFace's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


class Two(Bare):
    """The same with another output before the logits."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.config = model.config

    def forward(self, ids: Tensor) -> Any:
        return self.model.get_input_embeddings()(ids), self.model(ids).logits


# ------------------------------------------------------------------------ answers of a model


@pytest.mark.parametrize("name", BUILDS)
def test_loglikelihoods_are_those_of_the_harness(name: str, tokenizer: Any) -> None:
    hf = build(name, tokenizer)
    expected = theirs(hf, tokenizer).loglikelihood(
        [Instance("loglikelihood", {}, pair, 0, ("task", 0, 1)) for pair in PAIRS]
    )
    assert len({round(x, 2) for x, _ in expected}) > len(PAIRS) / 2  # they tell answers apart
    for model in (hf, prepare(hf)):
        found, lm = ask(model, tokenizer, PAIRS, "loglikelihood")
        assert_same_answers(found, expected)
        assert lm.truncated == {"task": 1}


def test_those_of_the_embedded_model_too(tokenizer: Any) -> None:
    hf, _ = load_default()
    pairs = PAIRS[:-1]
    expected, _ = ask(theirs(hf, tokenizer), tokenizer, pairs, "loglikelihood")
    found, _ = ask(prepare(hf), tokenizer, pairs, "loglikelihood", batch_size=4)
    assert_same_answers(found, expected)


def test_a_second_output_and_half_precision(tokenizer: Any) -> None:
    hf = build("gpt2", tokenizer)
    expected, _ = ask(hf, tokenizer, PAIRS, "loglikelihood")
    assert_same_answers(ask(Two(hf), tokenizer, PAIRS, "loglikelihood")[0], expected)
    found, _ = ask(prepare(hf.bfloat16()), tokenizer, PAIRS, "loglikelihood")
    # bfloat16 has 8 bits: a logit of 10 is off by 0.04.
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=0.02, abs=0.2)


@pytest.mark.parametrize("name", BUILDS)
def test_texts_have_the_loglikelihood_of_the_harness(name: str, tokenizer: Any) -> None:
    hf = build(name, tokenizer)
    texts = [(LONG,), ("A short one.",)]
    expected, _ = ask(theirs(hf, tokenizer), tokenizer, texts, "loglikelihood_rolling")
    found, _ = ask(prepare(hf), tokenizer, texts, "loglikelihood_rolling", batch_size=3)
    assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["prepared", "sim", "bare"])
def test_the_batch_changes_nothing(kind: str, tokenizer: Any) -> None:
    hf = build("llama", tokenizer)
    models = {"prepared": prepare, "bare": Bare, "sim": lambda m: quantized(prepare(m)).model}
    model = models[kind](hf)
    window = {"window": POSITIONS}
    one, _ = ask(model, tokenizer, PAIRS, "loglikelihood", **window)
    four, _ = ask(model, tokenizer, PAIRS, "loglikelihood", batch_size=4, **window)
    assert_same_answers(four, one, 1e-5)
    questions = [(q, {"until": ["zzzz"], "max_gen_toks": 8}) for q in (*QUESTIONS, LONG)]
    one, _ = ask(model, tokenizer, questions, "generate_until", **window)
    four, lm = ask(model, tokenizer, questions, "generate_until", batch_size=4, **window)
    assert four == one
    assert len(set(one)) > 3
    assert lm.truncated == {"task": 1}


@pytest.mark.parametrize("name", BUILDS)
def test_generated_tokens_are_those_of_huggingface(name: str, tokenizer: Any) -> None:
    hf = build(name, tokenizer)
    rows = [tokenizer(q, verbose=False).input_ids for q in QUESTIONS]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = hf.generate(ids, **settings)
    assert len({tuple(row) for row in expected[:, length:].tolist()}) > 1
    for model in (hf, prepare(hf), Bare(hf)):
        found = CausalLM(model, tokenizer.eos_token_id).generate(ids, **settings)
        assert torch.equal(found, expected)


def test_generated_texts_are_those_of_the_harness(tokenizer: Any) -> None:
    hf = build("gpt2", tokenizer)
    questions = [(q, {"until": ["e"], "max_gen_toks": 8}) for q in QUESTIONS]
    expected, _ = ask(theirs(hf, tokenizer, batch_size=3), tokenizer, questions, "generate_until")
    found, _ = ask(prepare(hf), tokenizer, questions, "generate_until", batch_size=3)
    assert found == expected
    assert all("e" not in text for text in found)


def by_hand(hf: Any, before: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        log_probs = hf(torch.tensor([[*before, *answer]])).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(before) - 1 + i, t]) for i, t in enumerate(answer))


def test_a_text_begins_with_what_the_tokenizer_puts_first(with_bos: Any) -> None:
    hf = build("llama", with_bos)
    question, answer = (with_bos(t, add_special_tokens=False).input_ids for t in ("A cat", " sat"))
    found, _ = ask(prepare(hf), with_bos, [("A cat", " sat")], "loglikelihood")
    assert found[0][0] == pytest.approx(by_hand(hf, [0, *question], answer), abs=1e-4)
    assert with_bos.eos_token_id == 0


def test_behind_a_prefix_it_does_not_begin_again(with_bos: Any) -> None:
    hf = build("llama", with_bos)
    model = prepare(hf)
    set_prefix(model, [0, 7, 9])
    question, answer = (with_bos(t, add_special_tokens=False).input_ids for t in ("A cat", " sat"))
    expected = by_hand(hf, [0, 7, 9, *question], answer)
    pairs = [("A cat", " sat"), (f"{with_bos.bos_token}A cat", " sat")]
    found, lm = ask(model, with_bos, pairs, "loglikelihood")
    assert [x for x, _ in found] == pytest.approx([expected] * 2, abs=1e-4)
    assert lm.max_length == POSITIONS - 3
    written, _ = ask(model, with_bos, [("A cat", {"max_gen_toks": 5})], "generate_until")
    ids = hf.generate(torch.tensor([[0, 7, 9, *question]]), max_new_tokens=5, do_sample=False)
    assert written == [with_bos.decode(ids[0, 3 + len(question) :], skip_special_tokens=True)]


# ------------------------------------------------------------------- flips and divergence


def test_a_model_beside_itself_has_neither_flips_nor_divergence(
    tokenizer: Any, folder: Path
) -> None:
    model = prepare(build("gpt2", tokenizer))
    tasks = ["both", "write", "text"]
    found = evaluate_tasks(
        model, tokenizer, tasks, reference=model, task_dir=folder, batch_size=2, progress=False
    )
    assert {s.task for s in found.scores} == {"both", "choice", "again", "write", "text"}
    assert all(score.value == score.reference for score in found.scores)
    flips = {(s.task, s.metric): s.flips for s in found.scores}
    assert flips["choice", "acc"] == Flips(0, 0, len(ITEMS))
    assert flips["both", "acc"] == Flips(0, 0, 2 * len(ITEMS))
    assert flips["write", "exact_match"] == Flips(0, 0, len(ITEMS))
    assert flips["text", "word_perplexity"] is None
    assert {d.mean for d in found.divergences.values()} == {0.0}
    assert set(found.divergences) == {"both", "choice", "again", "text"}


def test_a_sim_beside_its_model(tokenizer: Any, folder: Path) -> None:
    """Flips by the correctness of each item, the divergence by the logits themselves."""
    hf = build("gpt2", tokenizer)
    model = prepare(hf)
    sim = quantized(model)
    found = evaluate_tasks(
        sim, tokenizer, ["choice", "text"], reference=hf, task_dir=folder, progress=False
    )
    right = []
    for given in (sim.model, hf):
        answers, _ = ask(given, tokenizer, PAIRS, "loglikelihood")
        values = iter([x for x, _ in answers])
        best = [[next(values) for _ in choices] for _, choices, _ in ITEMS]
        right.append([row.index(max(row)) == a for row, (_, _, a) in zip(best, ITEMS, strict=True)])
    (accuracy,) = (s for s in found.scores if s.metric == "acc")
    assert accuracy.value == pytest.approx(sum(right[0]) / len(ITEMS))
    assert accuracy.reference == pytest.approx(sum(right[1]) / len(ITEMS))
    pairs = list(zip(*right, strict=True))
    assert accuracy.flips == Flips(pairs.count((False, True)), pairs.count((True, False)), 6)

    total, count = 0.0, 0
    for question, choices, answer in ITEMS:
        ids = tokenizer(question + choices[answer], verbose=False).input_ids
        row = torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]])
        with torch.no_grad():
            q, p = sim.model(row).log_softmax(-1), hf(row).logits.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    assert found.divergences["text"].tokens == count
    assert found.divergences["text"].mean == pytest.approx(total / count, rel=1e-3)
    assert total / count > 1e-6


def test_flips_of_a_case_made_by_hand() -> None:
    def results(correct: list[float], value: float) -> dict[str, Any]:
        samples = [{"doc_id": i, "filter": "none", "acc": x} for i, x in enumerate(correct)]
        return {
            "results": {"t": {"sample_len": 5, "acc,none": value, "acc_stderr,none": 0.2}},
            "samples": {"t": samples},
            "group_subtasks": {},
            "higher_is_better": {"t": {"acc": True}},
        }

    after, before = results([1.0, 0.0, 1.0, 0.0, 0.0], 0.4), results([1.0, 1.0, 0.0, 0.0, 1.0], 0.6)
    after["samples"]["t"][1]["acc"] = np.float64(0.0)  # as exact_match has it
    (score,) = scores_of(after, before)
    assert (score.value, score.error, score.reference) == (0.4, 0.2, 0.6)
    assert score.flips == Flips(to_incorrect=2, to_correct=1, items=5)
    assert score.flips.share == pytest.approx(0.6)
    assert json.loads(json.dumps(asdict(score)))["flips"]["to_incorrect"] == 2
    (alone,) = scores_of(after, None)
    assert (alone.reference, alone.flips) == (None, None)
    after["samples"]["t"][0]["acc"] = 0.5  # not right or wrong
    assert scores_of(after, before)[0].flips is None


def test_the_divergence_of_a_case_made_by_hand(tokenizer: Any) -> None:
    beside = Beside(CausalLM(gpt2(), 0))
    mine, other = torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    beside.add("t", mine.log(), other.log() + 3.0)
    expected = (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2
    found = beside.over(["t", "another"])
    assert found is not None
    assert found.mean == pytest.approx(expected, abs=1e-6)
    assert found.tokens == 2
    assert beside.over(["another"]) is None
    with pytest.raises(DataError, match="3 logits and its reference 2"):
        beside.add("t", torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(DataError, match="the divergence in t is nan"):
        beside.add("t", mine.log(), torch.full((2, 2), math.nan))


def test_a_reference_reads_what_the_model_holds(with_bos: Any, folder: Path) -> None:
    """Behind BOS as a constant a model is what it is behind BOS as a token."""
    hf = build("llama", with_bos)
    model = prepare(hf)
    set_prefix(model, [0])
    found = evaluate_tasks(
        model, with_bos, ["choice"], reference=hf, task_dir=folder, batch_size=3, progress=False
    )
    assert found.divergences["choice"].mean < 1e-6
    assert all(score.flips == Flips(0, 0, 6) for score in found.scores)
    assert found.window == POSITIONS - 1
    with pytest.raises(DataError, match=r"the reference holds the prefix \[0\] and the model none"):
        evaluate_tasks(hf, with_bos, ["choice"], reference=model, task_dir=folder)


# --------------------------------------------------------------------- what is left as it was


def test_nothing_of_the_callers_is_changed(tokenizer: Any, folder: Path) -> None:
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    hf = build("gpt2", own)
    hf.train()
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach() * 2)  # untied by hand
    before = {name: x.clone() for name, x in hf.state_dict().items()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    evaluate_tasks(hf, own, ["choice", "write"], task_dir=folder, progress=False)
    assert hf.training
    assert own.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in hf.state_dict().items())
    assert hf.lm_head.weight is not hf.transformer.wte.weight


# ----------------------------------------------------------------------------------- exports


def test_an_export_answers_as_its_sim(folder: Path, tokenizer: Any) -> None:
    pytest.importorskip("onnxruntime")
    sim, path = embedded(8)
    module = CpuSession(path).module()
    found = evaluate_tasks(
        module,
        tokenizer,
        ["choice", "write"],
        reference=sim,
        task_dir=folder,
        batch_size=2,
        progress=False,
    )
    assert found.window == module.length
    # Rounding moves a logit by a step of 8 bits at most; plain fp32 is 100 times as far.
    assert found.divergences["choice"].mean < 1e-2
    assert {s.items for s in found.scores} == {len(ITEMS)}


def test_the_file_of_a_model_with_a_prefix_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = prepare(gpt2(layers=1))
    set_prefix(model, [5, 6])
    sim = simulate(model, "htp_v73")
    set_ranges(sim, [torch.randint(3, 90, (2, 16))])
    module = CpuSession(export(sim, model.dummy_input(length=16), tmp_path / "out")).module()
    assert CausalLM(module, 0).prefix == (5, 6)
    assert CausalLM(module, 0).room == 16
    ids = torch.randint(3, 90, (3, 10))  # more rows than the file takes at once
    with torch.no_grad():
        expected = torch.as_tensor(sim.model(ids)).as_subclass(Tensor)
    step = float(sim.model.lm_head.output_quantizers[0].get_scale())
    assert_close(module(ids), expected, atol=4 * step, rtol=0)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["choise"]}, r"no task 'choise' .*Near it: .*choice"),
        ({"tasks": "choice"}, "give a list of names"),
        ({"tasks": []}, "give a list of names"),
        ({"task_dir": "nowhere"}, "there is no folder nowhere"),
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
    ],
)
def test_wrong_settings(
    changes: dict[str, Any], message: str, tokenizer: Any, folder: Path
) -> None:
    settings: dict[str, Any] = {"tasks": ["choice"], "task_dir": folder} | changes
    with pytest.raises(DataError, match=message):
        evaluate_tasks(gpt2(), tokenizer, **settings)


def test_what_does_not_fit_the_model(tokenizer: Any, folder: Path) -> None:
    short = build("gpt2", tokenizer, n_positions=6)
    with pytest.raises(DataError, match="write has 6 tokens generated and the model sees 6"):
        evaluate_tasks(short, tokenizer, ["write"], task_dir=folder, progress=False)
    with pytest.raises(DataError, match="a continuation of task has"):
        ask(short, tokenizer, [("A", LONG)], "loglikelihood")
    with pytest.raises(DataError, match="a continuation of task has 0 tokens"):
        ask(short, tokenizer, [("A", "")], "loglikelihood")


def test_a_tokenizer_without_an_end(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        evaluate_tasks(gpt2(), bare, ["choice"])


def test_without_the_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aimet_quadapter.evaluation.harness")
    for name in ("lm_eval", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'aimet_quadapter\[eval\]'"):
        evaluate_tasks(gpt2(), tokenizer, ["choice"])


# --------------------------------------------------------------------------------- the table


def test_the_table_and_the_json(tokenizer: Any, folder: Path) -> None:
    hf = build("gpt2", tokenizer)
    settings: dict[str, Any] = {"task_dir": folder, "limit": 4, "progress": False}
    found = evaluate_tasks(prepare(hf), tokenizer, ["choice"], reference=hf, **settings)
    head, first, *_, last = str(found).splitlines()
    assert head.split()[:5] == ["task", "metric", "items", "value", "±"]
    assert first.split()[:3] == ["choice", "acc", "4"]
    assert last == "the first 4 items of each task"
    written = json.loads(found.to_json())
    assert written["scores"][0]["flips"] == {"to_incorrect": 0, "to_correct": 0, "items": 4}
    assert written["divergences"]["choice"]["tokens"] > 0
    assert set(written["versions"]) == {"lm_eval", "transformers", "torch"}
    alone: TaskScores = evaluate_tasks(hf, tokenizer, ["choice"], **settings)
    assert "KL" not in str(alone)
    assert alone.scores[0].value == found.scores[0].reference
