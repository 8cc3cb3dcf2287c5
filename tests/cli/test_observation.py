"""The page of a run says what the sim and the results say."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import saved
from transformers import LlamaConfig, LlamaForCausalLM

from aimet_quadapter import coverage, load_default
from aimet_quadapter.artifacts.manifest import bit_widths
from aimet_quadapter.cli import main, observation
from aimet_quadapter.cli.run import Run
from aimet_quadapter.cli.settings import resolve
from aimet_quadapter.results.channel_chart import unpacked
from aimet_quadapter.results.run_facts import RunFacts

QUICK: dict[str, Any] = {"samples": 2, "length": 32, "eval_tokens": 64, "steps": 2}


class Watched:
    """A run whose page's facts are kept, with its sim as it was left."""

    def __init__(self, patch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.facts: list[RunFacts] = []
        self.sims: list[Any] = []
        see_end = observation.Observation.see_end

        def see(own: Any, sim: Any, alphas: Any) -> None:
            self.sims.append(sim)
            begin = time.perf_counter()
            see_end(own, sim, alphas)
            self.looking = time.perf_counter() - begin

        def kept(**values: Any) -> RunFacts:
            self.facts.append(RunFacts(**values))
            return self.facts[-1]

        patch.setattr(observation.Observation, "see_end", see)
        patch.setattr("aimet_quadapter.results.run_facts.RunFacts", kept)
        self.run = Run(resolve(QUICK | settings))
        self.run.go()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with the embedded model's tokenizer."""
    _, tokenizer = load_default()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**size, **heads)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def watched(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Behind a prefix, rotated, with phase 2."""
    output = str(tmp_path_factory.mktemp("run"))
    asked = {"model": str(llama), "prefix": [5, 9], "phase_2": True, "finetune_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        yield Watched(patch, output=output, export=False, **asked)


def page(watched: Watched) -> str:
    return (watched.run.output / "report.html").read_text(encoding="utf-8")


def test_the_channels_are_those_of_the_models(watched: Watched) -> None:
    (facts,), run = watched.facts, watched.run
    text = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page(watched))
    shown = json.loads(text[0])
    assert [one["name"] for one in shown] == run.pairs
    alphas = run.alphas
    for one, fact in zip(shown, facts.pairs, strict=True):
        alpha = alphas[fact.name].numpy()
        assert fact.before is not None
        np.testing.assert_allclose(unpacked(one["alpha"]), alpha, rtol=2**-8)
        np.testing.assert_allclose(unpacked(one["low_before"]), fact.before[0], rtol=2**-8)
        # the final sim's, without its quantizers: α of both phases is in its weights
        for end, values in zip(("low", "high"), fact.before, strict=True):
            np.testing.assert_allclose(
                unpacked(one[f"{end}_after"]), values * alpha, rtol=2**-7, atol=1e-4
            )


def test_losses_and_what_was_kept_are_the_results(watched: Watched) -> None:
    (facts,), result = watched.facts, watched.run.observation.result
    for fact, found in zip(facts.pairs, result.calibration.results, strict=True):
        assert fact.losses == found.losses
        assert fact.kept == found.kept
        assert fact.curve == found.curve
    assert result.calibration.choice is not None
    assert facts.choice == result.calibration.choice.losses
    assert facts.finetuning == watched.run.observation.finetuning.curve
    assert len(facts.finetuning) == 2
    # phase 2 has moved α: what the page shows is the product
    later = watched.run.observation.finetuning.alphas
    name = next(iter(later))
    assert not torch.equal(watched.run.alphas[name], result.alphas[name])


def test_sites_bits_and_coverage_are_the_sims(watched: Watched) -> None:
    (facts,), (sim,) = watched.facts, watched.sims
    assert facts.bits == bit_widths(sim)
    table = coverage(sim)
    assert facts.coverage.operations == len(table.rows)
    assert len(facts.coverage.missing) == len(table.missing)
    assert sum(missing for _, missing in facts.coverage.kinds.values()) == len(table.missing)
    again = observation.site_facts(watched.run.subject, sim)
    assert [one.site for one in facts.sites] == [one.site for one in again]
    assert facts.sites[0].site in page(watched)


def test_the_stream_is_seen_before_and_after(watched: Watched) -> None:
    (facts,) = watched.facts
    before, after = facts.streams
    assert before.title == "As the model is"
    assert after.title == "Behind a prefix of 2 tokens, rotated (hadamard)"
    assert len(before.tokens) == before.largest.shape[1] == 32
    assert after.largest.shape[1] == 30  # the prefix is no part of the text
    assert before.places == after.places
    assert facts.perplexity == watched.run.scores


def test_the_pages_own_time_is_on_it_but_for_writing_it(watched: Watched) -> None:
    (facts,), whole = watched.facts, watched.run.clock.seconds["report"]
    assert watched.looking < facts.seconds["report"] < whole


def test_the_page_names_no_folder_of_this_machine(watched: Watched, llama: Path) -> None:
    text = page(watched)
    assert str(llama.parent) not in text
    assert str(watched.run.output) not in text
    assert llama.name in text


def test_a_run_without_a_page(llama: Path, tmp_path: Path) -> None:
    given = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]
    plain = ["--prefix", "none", "--rotate", "none", "--no-export", "--no-report"]
    assert main(["run", str(llama), *given, *plain, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "result.json").exists()
    assert not (tmp_path / "report.html").exists()
