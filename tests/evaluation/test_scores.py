import math
from types import SimpleNamespace

import aimet_torch
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from aimet_quadapter import DataError, SimError, perplexity, prepare

VOCABULARY = 97
TOLERANCE = 1e-5
"""Relative. The loss of a window, 8 or so, is an fp32 number whose last bit is 1e-6, and `exp`
makes that a relative error; one token too many or too few changes the result by 1e-3 and more."""


@pytest.fixture(scope="module")
def hf() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (150,), generator=torch.Generator().manual_seed(1))


def recipe(model: nn.Module, ids: Tensor, window: int, stride: int, *, as_printed: bool) -> float:
    """Perplexity as transformers' "Perplexity of fixed-length models" computes it.

    As printed there, a window weighs one token less than its new tokens ("due to internal label
    shift"); but all of them are scored wherever an older token stands before them.
    """
    total, weights, seen = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        x = ids[:, begin:end]
        labels = x.clone()
        labels[:, : -(end - seen)] = -100
        with torch.no_grad():
            loss = model(x, labels=labels).loss
        if as_printed:
            weight = int((labels != -100).sum()) - len(labels)
        else:
            weight = int((labels[:, 1:] != -100).sum())
        total += loss.item() * weight
        weights += weight
        seen = end
        if end == ids.shape[1]:
            break
    return math.exp(total / weights)


def test_one_window_is_exp_of_the_cross_entropy(hf: GPT2LMHeadModel, tokens: Tensor) -> None:
    ids = tokens[:32]
    direct = cross_entropy(hf(ids[None]).logits[0, :-1], ids[1:]).exp().item()
    assert perplexity(hf, ids, window=32) == pytest.approx(direct, rel=TOLERANCE)
    assert perplexity(hf, ids[None], window=1024) == pytest.approx(direct, rel=TOLERANCE)


def test_a_short_last_window_weighs_by_its_tokens(hf: GPT2LMHeadModel, tokens: Tensor) -> None:
    parts = tokens.split(32)  # 32, 32, 32, 32, 22
    losses = [cross_entropy(hf(p[None]).logits[0, :-1], p[1:], reduction="sum") for p in parts]
    direct = math.exp(sum(loss.item() for loss in losses) / sum(len(p) - 1 for p in parts))
    assert perplexity(hf, tokens, window=32) == pytest.approx(direct, rel=TOLERANCE)


def test_a_last_window_of_one_token_scores_nothing(hf: GPT2LMHeadModel, tokens: Tensor) -> None:
    assert perplexity(hf, tokens[:33], 32) == perplexity(hf, tokens[:32], 32)


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
@pytest.mark.parametrize("length", [150, 128, 47, 20])
def test_sliding_windows_are_those_of_transformers(
    hf: GPT2LMHeadModel, tokens: Tensor, stride: int, length: int
) -> None:
    ids = tokens[:length]
    ours = perplexity(hf, ids, 32, stride)
    assert ours == pytest.approx(recipe(hf, ids[None], 32, stride, as_printed=False), rel=TOLERANCE)


def test_the_weights_as_printed_there_change_little(hf: GPT2LMHeadModel, tokens: Tensor) -> None:
    printed = recipe(hf, tokens[None], 32, 32, as_printed=True)
    assert perplexity(hf, tokens, 32) == pytest.approx(printed, rel=TOLERANCE)
    printed = recipe(hf, tokens[None], 32, 16, as_printed=True)
    assert perplexity(hf, tokens, 32, 16) == pytest.approx(printed, rel=0.02)


def test_every_token_but_the_first_is_scored_once_when_windows_overlap(
    hf: GPT2LMHeadModel, tokens: Tensor
) -> None:
    nll = cross_entropy(hf(tokens[None, :32]).logits[0, :-1], tokens[1:32], reduction="none")
    for i in range(32, 150):
        seen = tokens[i - 31 : i + 1]
        last = cross_entropy(hf(seen[None]).logits[0, -2:-1], seen[-1:], reduction="none")
        nll = torch.cat([nll, last])
    assert len(nll) == 149
    direct = nll.double().mean().exp().item()
    assert perplexity(hf, tokens, 32, 1) == pytest.approx(direct, rel=TOLERANCE)


@pytest.mark.parametrize("stride", [None, 5])
def test_the_batch_changes_nothing(hf: GPT2LMHeadModel, tokens: Tensor, stride: int | None) -> None:
    one = perplexity(hf, tokens, 16, stride)
    assert perplexity(hf, tokens, 16, stride, batch_size=4) == pytest.approx(one, rel=TOLERANCE)


def test_prepared_model_and_sim(hf: GPT2LMHeadModel, tokens: Tensor) -> None:
    model = prepare(hf)
    plain = perplexity(hf, tokens, 32)
    assert perplexity(model, tokens, 32) == pytest.approx(plain, rel=1e-4)
    sim = aimet_torch.QuantizationSimModel(model, model.dummy_input(), default_output_bw=16)
    sim.compute_encodings(lambda m: m(tokens[None, :32]))
    assert perplexity(sim, tokens, 32) == pytest.approx(perplexity(sim.model, tokens, 32))
    assert perplexity(sim, tokens, 32) != plain
    assert perplexity(sim, tokens, 32) == pytest.approx(plain, rel=0.1)


def test_long_windows_are_scored_in_chunks() -> None:
    """More rows than are put through the softmax at once, in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 11, dtype=torch.bfloat16))
    ids = torch.randint(11, (700,))
    direct = cross_entropy(model(ids)[:-1].float(), ids[1:]).exp().item()
    assert perplexity(model, ids) == pytest.approx(direct, rel=TOLERANCE)


def test_modes_are_put_back_and_dropout_is_off(tokens: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY), nn.Dropout(0.5), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    assert perplexity(model, tokens, 32) == perplexity(model, tokens, 32)
    assert [m.training for m in model] == [True, False, True]
    model[0].register_forward_hook(lambda *call: call[-1] * torch.nan)
    with pytest.raises(DataError, match="NaN"):
        perplexity(model, tokens, 32)
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([], dtype=torch.long), r"0 token\(s\)"),
        (torch.tensor([3]), r"1 token\(s\)"),
        (torch.zeros(2, 9, dtype=torch.long), r"shape \(2, 9\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.zeros(9), "float32"),
        (torch.zeros(9, dtype=torch.bool), "bool"),
        (torch.tensor([1, VOCABULARY]), f"0 … {VOCABULARY - 1}"),
        (torch.tensor([1, -1]), "from -1"),
        ([1, 2, 3], "list, not a tensor"),
    ],
)
def test_bad_tokens(hf: GPT2LMHeadModel, bad: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(hf, bad, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 32, "stride": 0}, "stride is 0"),
        ({"window": 32, "stride": 33}, "stride is 33"),
        ({"window": 32, "batch_size": 0}, "batch_size is 0"),
        ({"window": 33}, "32 positions"),
    ],
)
def test_bad_settings(
    hf: GPT2LMHeadModel, tokens: Tensor, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(hf, tokens, **settings)


def test_not_a_language_model(tokens: Tensor) -> None:
    with pytest.raises(DataError, match="Pass a causal language model"):
        perplexity(nn.Flatten(0), tokens, 32)
    with pytest.raises(DataError, match="returned SimpleNamespace"):
        perplexity(Wrapper(), tokens, 32)
    with pytest.raises(SimError, match="not str"):
        perplexity("gpt2", tokens, 32)


class Wrapper(nn.Module):
    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(shape=ids.shape)
