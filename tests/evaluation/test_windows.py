import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimet_quadapter import DataError, calibration_samples
from aimet_quadapter.evaluation import windows as module


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 6),
    length=st.integers(1, 9),
    spare=st.integers(0, 20),
    seed=st.integers(),
)
def test_samples_are_windows_that_do_not_overlap(
    samples: int, length: int, spare: int, seed: int
) -> None:
    ids = torch.arange(samples * length + spare)  # an id is its place
    drawn = calibration_samples(ids[None], samples, length, seed)
    assert [window.shape for window in drawn] == [(1, length)] * samples
    for window in drawn:
        start = int(window[0, 0])
        assert torch.equal(window[0], ids[start : start + length])
    joined = torch.cat(drawn, 1)[0]
    assert torch.equal(joined, joined.unique())  # in order, no token twice
    assert all(map(torch.equal, drawn, calibration_samples(ids, samples, length, seed)))


def test_every_choice_of_windows_is_equally_likely() -> None:
    ids = torch.arange(6)  # two windows of 2: 6 ways to place them
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(3_000):
        starts = tuple(int(w[0, 0]) for w in calibration_samples(ids, 2, 2, seed))
        seen[starts] = seen.get(starts, 0) + 1
    assert set(seen) == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    assert all(400 < times < 600 for times in seen.values())


def test_too_few_tokens_for_the_samples() -> None:
    for samples, length in ((3, 4), (0, 4), (2, 0), (-1, -4)):
        with pytest.raises(DataError, match="from 11 tokens without overlap"):
            calibration_samples(torch.arange(11), samples, length, 0)


def test_a_sample_must_not_occur_in_the_evaluation_text() -> None:
    generator = random.Random(0)
    text = torch.tensor([generator.randrange(5) for _ in range(400)])
    (window,) = calibration_samples(text, 1, 40, seed=3)
    apart = torch.tensor([generator.randrange(5) for _ in range(400)])
    calibration_samples(text, 1, 40, seed=3, exclude=apart)
    for exclude in (text, text[None], window, torch.cat([apart[:7], window[0], apart])):
        with pytest.raises(DataError, match="occurs in the evaluation text"):
            calibration_samples(text, 1, 40, seed=3, exclude=exclude)
    almost = torch.cat([apart[:7], window[0, :-1], window[0, -1:] + 1, apart])
    calibration_samples(text, 1, 40, seed=3, exclude=almost)


def test_only_whole_ids_count_as_an_occurrence() -> None:
    # The bytes of 1 stand inside those of 256, but the id does not occur.
    assert not module._occurs(torch.tensor([[1]]), torch.tensor([256, 256, 0]))
    assert module._occurs(torch.tensor([[1]]), torch.tensor([256, 256, 1]))
