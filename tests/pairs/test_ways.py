"""What one sample does not show: other ways through a model, and memory that is shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import FAST, decoder_sim, llama, make_sim, tokens
from torch import Tensor, nn
from torch.testing import assert_close

from aimet_quadapter import apply_quadapter, find_pairs, fold


def bare(model: nn.Module) -> Any:
    """What `find_pairs` needs of a sim, without the seconds it takes to make one."""
    return SimpleNamespace(model=model.eval(), connected_graph=None)


def x(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 6)), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_exact(model: nn.Module, pairs: Any, *inputs: tuple[Any, ...]) -> None:
    """Random α folded into all pairs leave the output as it is, on inputs nobody has seen."""
    before = [model(*args) for args in inputs]
    generator = torch.Generator().manual_seed(1)
    alphas = {p.name: torch.exp(torch.randn(p.channels, generator=generator)) for p in pairs}
    fold(SimpleNamespace(model=model), pairs, alphas)
    for args, expected in zip(inputs, before, strict=True):
        assert_close(model(*args), expected, rtol=1e-4, atol=1e-4)


class Heads(nn.Module):
    """A norm that one head reads always and another when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        return self.first(h) if task is None else self.second(h)


def test_a_head_that_no_sample_runs_refuses_the_pair_by_name() -> None:
    pairs = find_pairs(bare(Heads()), (x(),))
    assert not pairs
    assert pairs.not_run == ("second",)
    assert "second" in pairs.refused[0].reason
    assert "not run by any sample: second" in str(pairs)


def test_a_head_that_some_sample_runs_is_divided() -> None:
    model, task = Heads(), torch.ones(1)
    pairs = find_pairs(bare(model), samples=[(x(),), (x(), task)])
    assert [p.name for p in pairs] == ["norm -> first, second"]
    assert_exact(model, pairs, (x(7),), (x(8), task))


def test_a_head_that_is_never_run_may_be_named() -> None:
    pairs = find_pairs(bare(Heads()), (x(),), unused=["sec*"])
    assert [p.name for p in pairs] == ["norm -> first"]


def test_both_heads_are_learned_for() -> None:
    model, task = Heads(), torch.ones(5)
    sim = make_sim(model, x(), task)
    samples = [(x(0),), (x(1), task), (x(2),), (x(3), task)]
    sim.compute_encodings(lambda m: [m(*s) for s in samples])
    result = apply_quadapter(sim, samples, calibration=FAST)
    assert [p.name for p in result.pairs] == ["norm -> first, second"]


class Twice(nn.Module):
    """A head that reads one norm, or another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.LayerNorm(6)
        self.b = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.head(self.a(x) if other is None else self.b(x))


def test_a_consumer_of_two_producers_on_two_ways_is_refused() -> None:
    pairs = find_pairs(bare(Twice()), samples=[(x(),), (x(), x())])
    assert not pairs
    assert "head reads something else on another way" in str(pairs)


class Experts(nn.Module):
    """Each row goes to one of four experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.router = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = self.router(h).argmax(-1)
        out = torch.zeros_like(h)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_copy(0, rows, self.experts[number](h[rows]))
        return out


def test_an_expert_that_no_token_reaches_is_named_and_nothing_is_wrong() -> None:
    model = Experts()
    few = x(0, 1, 6)
    pairs = find_pairs(bare(model), (few,))
    assert not pairs
    assert len(pairs.not_run) == 6
    many = find_pairs(bare(model), samples=[(x(seed, 1, 6),) for seed in range(40)])
    assert many.not_run == ()
    assert sum(p.kind == "linear-relu-linear" for p in many) == 4
    assert_exact(model, many, (x(100, 64, 6),))


class OnLength(nn.Module):
    """Takes another way when the input is short."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(h) if x.shape[1] > 4 else self.head(h + 1)


def test_a_branch_on_the_length_is_found_by_the_proof() -> None:
    pairs = find_pairs(bare(OnLength()), (x(0, 2, 8, 6),))
    assert not pairs
    assert any("not exact" in r.reason for r in pairs.refused)


class Halves(nn.Module):
    """One half of the channels goes on, or the other: the same operation with another number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(3, 4)

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        h = self.a(x)
        return self.b(h[:, 3:] if late else h[:, :3])


@pytest.mark.parametrize("late", [False, True])
def test_a_way_that_differs_in_a_number_only_is_proven_too(late: bool) -> None:
    pairs = find_pairs(bare(Halves()), samples=[(x(), late), (x(), not late)])
    assert not pairs
    assert "not exact" in str(pairs)


class Borrows(nn.Module):
    """A function reads a weight: one of its own, or that of a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.own = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor, borrow: bool = False) -> Tensor:
        return self.b(self.a(x)) + nn.functional.linear(x, self.b.weight if borrow else self.own)


def test_a_weight_that_a_function_reads_on_one_way_is_shared() -> None:
    pairs = find_pairs(bare(Borrows()), samples=[(x(),), (x(), True)])
    assert not pairs
    assert "also read by linear()" in str(pairs)


class AllExperts(Experts):
    """The experts are called even where they get no row."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = self.router(h).argmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_copy(0, rows, expert(h[rows]))
        return out


def test_an_expert_that_is_called_with_nothing_counts_as_not_run() -> None:
    model = AllExperts()
    few = find_pairs(bare(model), (x(0, 1, 6),))
    assert not few
    assert len(few.not_run) == 6
    many = find_pairs(bare(model), samples=[(x(seed, 1, 6),) for seed in range(40)])
    assert many.not_run == ()
    assert sum(p.kind == "linear-relu-linear" for p in many) == 4
    assert_exact(model, many, (x(100, 64, 6),))


def test_experts_are_learned_for_where_some_samples_give_them_nothing() -> None:
    sim = make_sim(AllExperts(), x(0, 64, 6))
    samples = [(x(seed, 1, 6),) for seed in range(40)]
    sim.compute_encodings(lambda m: m(x(7, 64, 6)))
    result = apply_quadapter(sim, samples, calibration=FAST)
    assert sum(p.kind == "linear-relu-linear" for p in result.pairs) == 4


class TwoLinears(nn.Module):
    """What the models below are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)


class Rest(TwoLinears):
    """What lies behind the fifth place of a sample, if anything does, goes on by itself."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h).sum(1) + torch.sigmoid(h[:, 5:]).sum()


def test_a_part_that_is_empty_in_every_sample_blocks_its_producer() -> None:
    pairs = find_pairs(bare(Rest()), (x(0, 2, 5, 6),))
    assert not pairs
    assert "empty" in pairs.refused[0].reason


class NoChannels(TwoLinears):
    """Takes the channels behind the last apart: there are none of any sample."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        rotated: Tensor = self.b(torch.cat((h[..., :6].relu(), h[..., 6:]), -1))
        return rotated


def test_a_slice_of_no_channels_is_empty_of_every_sample() -> None:
    model = NoChannels()
    pairs = find_pairs(bare(model), (x(0, 2, 5, 6),))
    assert [p.name for p in pairs] == ["a -> b"]
    assert_exact(model, pairs, (x(1, 3, 7, 6),))


class InPlace(TwoLinears):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.mul_(2)))


def test_a_model_that_changes_its_input_is_proven_on_one_input() -> None:
    model, given = InPlace(), x()
    pairs = find_pairs(bare(model), (given,))
    assert [p.name for p in pairs] == ["a -> b"]
    assert torch.equal(given, x())


def shared(make: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6))
    if make == "one parameter":
        model[2].weight = model[1].weight
    elif make == "one storage":
        model[2].weight = nn.Parameter(model[1].weight.data)
    elif make == "a view":
        both = torch.randn(9, 6)
        model[1].weight, model[2].weight = nn.Parameter(both[:6]), nn.Parameter(both[3:])
    return model


@pytest.mark.parametrize("make", ["one parameter", "one storage", "a view"])
def test_what_is_shared_counts_as_shared(make: str) -> None:
    pairs = find_pairs(bare(shared(make)), (x(),))
    assert not pairs
    assert "tied to" in str(pairs)


def test_parts_of_one_storage_that_do_not_touch_are_not_shared() -> None:
    model, both = shared("nothing"), torch.randn(12, 6)
    model[1].weight, model[2].weight = nn.Parameter(both[:6]), nn.Parameter(both[6:])
    assert len(find_pairs(bare(model), (x(),))) == 2


def test_a_view_that_a_function_reads_is_shared() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6)
            self.transposed = self.b.weight.data.t()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) @ self.transposed

    pairs = find_pairs(bare(Reads()), (x(),))
    assert not pairs
    assert "also read by" in str(pairs)


class OneActivation(nn.Module):
    """One ReLU, called behind two layers: one quantizer for two tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


def test_an_activation_that_is_called_twice_lets_pairs_through() -> None:
    """As docs/architectures.md says: it holds no weight, so both pairs are exact."""
    model = OneActivation()
    pairs = find_pairs(bare(model), (x(),))
    assert [p.name for p in pairs] == ["a -> b", "b -> c"]
    assert_exact(model, pairs, (x(9),))


def test_samples_may_be_a_tensor_of_them() -> None:
    """As in the README: a loader is anything that can be gone through."""
    sim = decoder_sim(llama())
    assert len(find_pairs(sim, samples=tokens(3, 8).reshape(3, 1, 8))) == len(find_pairs(sim))
