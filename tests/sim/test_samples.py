"""What reaches a model is what the caller's own call would give it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import VOCAB, decoder_sim, gpt2, llama, make_sim, tokens
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import DataError, prepare, set_ranges
from aimet_quadapter.sim.inputs import Sample
from aimet_quadapter.sim.samples import MOST_BATCHES, as_samples


def x(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)), generator=torch.Generator().manual_seed(seed))


class Defaults(nn.Module):
    """Takes arguments with defaults, one of them by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor, gain: float = 2.0, shift: Any = None, *, power: int = 1) -> Tensor:
        assert gain is not None
        y = self.a(x) * gain
        return y**power if shift is None else y**power + shift


SAMPLES = {
    "a tensor": x(),
    "a tuple": (x(), 3.0),
    "a list": [x(), 3.0],
    "a dict": {"x": x()},
    "a dict that leaves out an argument with a default": {"x": x(), "shift": x(1)},
    "a keyword-only argument": {"x": x(), "power": 2},
}


@pytest.mark.parametrize("case", SAMPLES)
def test_the_model_computes_what_the_callers_own_call_computes(case: str) -> None:
    model, given = Defaults(), SAMPLES[case]
    if isinstance(given, dict):
        expected = model(**given)
    else:
        expected = model(*given) if isinstance(given, (tuple, list)) else model(given)
    got = torch.cat([sample(model) for sample in as_samples([given], model)])
    assert_close(got, expected)


def test_a_range_is_that_of_the_callers_own_call() -> None:
    model, batch = Defaults(), {"x": x(), "shift": x(1)}
    sim = make_sim(model, x())
    set_ranges(sim, [batch])
    own = make_sim(model, x())
    own.compute_encodings(lambda m: m(**batch))
    assert_close(
        sim.model.a.output_quantizers[0].get_max(), own.model.a.output_quantizers[0].get_max()
    )


class TimeFirst(nn.Module):
    """Takes (T, B, C) and looks at what came before."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)


class Among(nn.Module):
    """Every row depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("model", [TimeFirst(), Among()])
def test_a_batch_whose_rows_depend_on_each_other_stays_whole(model: nn.Module) -> None:
    (sample,) = as_samples([x()], model)
    assert_close(sample(model), model(x()))


class AtOnce(nn.Module):
    """Rows depend on each other where there are three or more, or when asked to."""

    def forward(self, x: Tensor, mixed: bool = False) -> Tensor:
        return self.a(x - x.mean(0) if mixed or len(x) > 2 else x)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)


def test_rows_are_seen_to_be_independent_for_each_size_and_setting() -> None:
    """What a batch of one or two shows says nothing of one of four."""
    batches = [(x(0, 1, 6),), (x(1, 2, 6),), (x(2, 4, 6),), (x(3, 2, 6), True), (x(4, 2, 6), False)]
    sizes = [len(sample.args[0]) for sample in as_samples(batches, AtOnce())]
    assert sizes == [1, 1, 1, 4, 2, 1, 1]


class Doubles(nn.Module):
    """Works in place on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.mul_(2))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)


def test_a_model_that_works_in_place_is_given_copies() -> None:
    given = x()
    (sample,) = as_samples([(given[None],)], Doubles())
    assert_close(sample(Doubles()), Doubles()(x()[None]))
    assert_close(given, x())


def test_a_batch_of_independent_rows_is_split() -> None:
    model = nn.Linear(6, 6)
    assert len(as_samples([x()], model)) == 4


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_set_a_range(build: Any, side: str) -> None:
    ids = tokens(batch=1, length=10)
    padding = torch.full((1, 6), 5)
    mask = torch.ones(1, 10, dtype=torch.long)
    parts = [(padding, torch.zeros_like(padding)), (ids, mask)]
    parts = parts if side == "left" else parts[::-1]
    batch = {
        "input_ids": torch.cat([p for p, _ in parts], 1),
        "attention_mask": torch.cat([m for _, m in parts], 1),
    }
    positions = torch.arange(16)[None, 6:] if side == "left" else None
    sim, own = decoder_sim(build()), decoder_sim(build())
    set_ranges(sim, [batch])
    set_ranges(own, [{"input_ids": ids, "attention_mask": mask, "position_ids": positions}])
    for (name, a), (_, b) in zip(sim.named_quantizers(), own.named_quantizers(), strict=True):
        assert_close(a.get_min(), b.get_min(), msg=name)
        assert_close(a.get_max(), b.get_max(), msg=name)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_rows_of_a_padded_batch_are_what_they_are_alone(build: Any) -> None:
    model = prepare(build())
    ids = tokens(batch=3, length=12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 9:] = 0
    samples = as_samples([{"input_ids": ids, "attention_mask": mask}], model)
    whole = model(ids, mask)
    for sample, row, seen in zip(samples, whole, mask.bool(), strict=True):
        assert_close(sample(model)[0], row[seen], rtol=1e-4, atol=1e-4)


def test_a_float_mask_hides_padding_too() -> None:
    model = prepare(gpt2())
    ids = tokens(batch=1, length=8)
    mask = torch.full((8, 8), -50.0).triu(1)
    mask[:, 6:] = -50.0
    (sample,) = as_samples([(ids, mask[None, None])], model)
    assert sample.args[0].shape == (1, 6)
    assert_close(sample(model), model(ids, mask[None, None])[:, :6], rtol=1e-4, atol=1e-4)


class Sums(nn.Module):
    """What padding holds reaches every token, whatever the mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(VOCAB, 6)
        self.a = nn.Linear(6, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.a(self.e(input_ids) + self.e(input_ids).sum(1, keepdim=True))


def test_padding_that_cannot_be_left_out_is_refused() -> None:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, :3] = 0
    with pytest.raises(DataError, match="batch 0 has padding, and without it"):
        as_samples([{"input_ids": tokens(1, 8), "attention_mask": mask}], Sums())


BAD: dict[str, tuple[Any, str]] = {
    "(input, label)": ((x(), torch.zeros(4), 1, 2, 3), "tuple of 5.*If the last is a label"),
    "a missing argument": ({"gain": 1.0}, "is not what the model's forward takes: missing"),
    "an unknown key": ({"x": x(), "labels": x()}, "key 'labels'"),
    "NaN": (torch.full((1, 6), float("nan")), "holds NaN or inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_model_cannot_take_is_refused(case: str) -> None:
    batch, message = BAD[case]
    with pytest.raises(DataError, match=message):
        as_samples([batch], Defaults())


def test_labels_in_the_place_of_a_mask_are_refused() -> None:
    with pytest.raises(DataError, match=r"If the batch is \(input, label\)"):
        as_samples([(tokens(), tokens(seed=1))], prepare(gpt2()))


def test_an_endless_loader_is_refused_after_a_while() -> None:
    with pytest.raises(DataError, match=f"yielded {MOST_BATCHES} batches.*islice"):
        as_samples(itertools.repeat(x(0, 1, 6)), nn.Linear(6, 6))


def test_embeddings_of_a_language_model_are_not_token_ids() -> None:
    class FromEmbeddings(nn.Linear):
        config = gpt2().config

    assert as_samples([x(0, 1, 4, 6)], FromEmbeddings(6, 6))


def test_an_input_by_name_takes_the_place_of_the_positional_one() -> None:
    model = Defaults()
    changed = Sample((x(), 3.0)).with_named(model, gain=1.0, shift=x(1))
    assert changed.named(model).keys() == {"x", "gain", "shift"}
    assert changed.named(model)["gain"] == 1.0
