"""The choice of a prefix: the one behind which the ranges are smallest, or none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import llama, tokens
from torch import Tensor

from aimet_quadapter import (
    DataError,
    UnsupportedModelError,
    choose_prefix,
    load_default,
    prepare,
    set_prefix,
)
from aimet_quadapter.sim import samples as reading
from aimet_quadapter.transforms import prefix_choice


class Tokenizer:
    """As much of a tokenizer as the choice asks for; the text of a token is its number."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, first: tuple[int, ...] = ()) -> None:
        self.first = first

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def _what_it_puts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lambda tokenizer: torch.tensor(tokenizer.first, dtype=torch.long)  # noqa: E731
    monkeypatch.setattr(prefix_choice, "prompt_prefix", first)


def with_sink(size: float = 60.0) -> Any:
    """A Llama whose first token, and no other, has a large row in the stream.

    Its first layer's attention adds a large value where the first token attends to itself alone.
    """
    model = prepare(llama(layers=2))
    measure = prefix_choice._Search._measure

    def with_large_first_row(self: Any, ids: tuple[int, ...]) -> Any:
        handle = None
        if not ids:

            def enlarge(_: Any, __: Any, x: Tensor) -> Tensor:
                x = x.clone()
                x[:, 0] *= size
                return x

            handle = self.model.model.layers[0].add_mlp.register_forward_hook(enlarge)
        try:
            return measure(self, ids)
        finally:
            if handle is not None:
                handle.remove()

    return model, with_large_first_row


def test_a_prefix_is_taken_where_the_first_token_is_a_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measure = with_sink()
    monkeypatch.setattr(prefix_choice._Search, "_measure", measure)
    found = choose_prefix(model, Tokenizer(), [tokens(1, 48, 3)], tolerance=10.0)
    none = found.candidates[0]
    chosen = next(c for c in found.candidates if c.ids == found.ids)
    assert none.ids == ()
    assert found.ids
    assert model.prefix == found.ids
    assert chosen.spread < none.spread - prefix_choice.WORTH
    assert f"{list(found.ids)}" in str(found)
    assert "none" in str(found)


def test_a_token_in_the_midst_of_the_text_may_begin_another_and_be_a_sink_there() -> None:
    model, text = prepare(llama(layers=2)), tokens(1, 48, 3)
    read: list[Tensor] = []

    def enlarge(_: Any, __: Any, x: Tensor) -> Tensor:
        loud = (read[-1][:, 0] == text[0, 20]) | (not model.prefix)
        return torch.cat((x[:, :1] * torch.where(loud, 60.0, 1.0)[:, None, None], x[:, 1:]), 1)

    def quiet_behind_two(module: Any, given: Any, x: Tensor) -> Tensor:
        return x if len(model.prefix) > 1 else enlarge(module, given, x)

    model.part("embed").register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model.model.layers[0].add_mlp.register_forward_hook(quiet_behind_two)
    found = choose_prefix(model, Tokenizer(), [text], tolerance=10.0)
    assert len(found.ids) == 2
    alone = [c for c in found.candidates if len(c.ids) == 1]
    assert min(c.spread for c in alone) > 2  # quiet but for that one token
    assert max(c.outliers for c in alone) < found.candidates[0].outliers


def test_a_text_whose_tokens_are_all_sinks_at_its_beginning_gets_a_prefix() -> None:
    model, text = prepare(llama(layers=2)), torch.arange(3, 51)[None]  # all of its starts

    def loud_first(_: Any, __: Any, x: Tensor) -> Tensor:
        return x if model.prefix else torch.cat((x[:, :1] * 60, x[:, 1:]), 1)

    model.model.layers[0].add_mlp.register_forward_hook(loud_first)
    found = choose_prefix(model, Tokenizer(), [text], tolerance=10.0)
    assert found.ids
    none = found.candidates[0]
    assert none.outliers > 0.5
    assert none.spread > 2


def test_a_text_of_nothing_but_what_is_put_first_has_no_candidates() -> None:
    text = torch.ones(1, 40, dtype=torch.long)
    tokenizer = Tokenizer(first=(1,))
    tokenizer.eos_token_id = 1
    found = choose_prefix(prepare(llama()), tokenizer, [text], tolerance=10.0)
    assert [c.ids for c in found.candidates] == [(), (1,)]


def test_none_is_a_possible_answer() -> None:
    model = prepare(llama())
    found = choose_prefix(model, Tokenizer(), [tokens(1, 48, 3)], tolerance=-0.9)
    assert found.ids == ()
    assert model.prefix == ()
    assert len(found.candidates) > 5


def test_what_the_tokenizer_puts_first_begins_every_candidate_and_is_not_counted() -> None:
    model = prepare(llama())
    text = torch.cat((torch.tensor([[1]]), tokens(1, 40, 3)), 1)
    found = choose_prefix(model, Tokenizer(first=(1,)), [text], tolerance=10.0)
    assert all(c.ids[:1] == (1,) for c in found.candidates[1:])
    assert found.candidates[1].ids == (1,)
    # The same text behind the same token, sent or kept: one loss.
    assert found.candidates[0].loss == pytest.approx(found.candidates[1].loss, rel=1e-5)


def test_the_embedded_model_and_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    hf, tokenizer = load_default()
    model = prepare(hf)
    ids = torch.arange(96)[None] % hf.config.vocab_size
    found = choose_prefix(model, tokenizer, [ids], longest=1)
    assert model.prefix == found.ids
    assert {c.ids[0] for c in found.candidates[1:]} >= {tokenizer.eos_token_id}


def test_what_cannot_be_judged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="prepared model"):
        choose_prefix(llama(), Tokenizer(), [tokens()])
    model = prepare(llama())
    with pytest.raises(DataError, match="token ids"):
        choose_prefix(model, Tokenizer(), [(tokens(1, 8), None, torch.arange(8)[None])])
    with pytest.raises(DataError, match="2 are needed"):
        choose_prefix(model, Tokenizer(first=(1,)), [torch.tensor([[1, 5]])])
    monkeypatch.setattr(reading, "MOST_BATCHES", 4)
    for loader, message in (
        (itertools.repeat(tokens()), "yielded 4 batches"),
        ([], "yields no samples"),
        ([tokens().to("meta")], "on meta"),
    ):
        with pytest.raises(DataError, match=message):
            choose_prefix(model, Tokenizer(), loader)
    calls = []

    def interrupted(self: Any, ids: tuple[int, ...]) -> Any:
        calls.append(ids)
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix_choice._Search, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose_prefix(model, Tokenizer(), [tokens(1, 20)])
    assert model.prefix == ()


@pytest.mark.parametrize("first", [(), (1,)])
def test_how_long_a_choice_takes_is_known_before(
    first: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate takes a second by this clock: seconds are candidates. The prefix stays."""
    model, tokenizer = prepare(llama()), Tokenizer(first)
    samples = [torch.cat((torch.tensor([list(first)]).long(), tokens(1, 48, 3)), 1)]
    set_prefix(model, [7])
    clock = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(prefix_choice.time, "perf_counter", lambda: float(next(clock)))
        seconds = prefix_choice.seconds_to_choose(model, tokenizer, samples)
    assert list(model.prefix) == [7]
    found = choose_prefix(model, tokenizer, samples, tolerance=10.0)
    assert len(found.candidates) / 1.5 <= seconds <= len(found.candidates) * 1.5
