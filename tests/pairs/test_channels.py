import torch
from families import FAMILIES
from tiny import batches, outlier_gpt2, ready, simulate
from torch.testing import assert_close

from aimet_quadapter import find_pairs, fold, prepare
from aimet_quadapter.pairs.channels import channel_ends


def test_ends_are_those_of_what_the_consumer_reads() -> None:
    model = outlier_gpt2()
    sim = simulate(model)
    pairs = find_pairs(sim)
    ends = channel_ends(model, pairs, batches())
    assert list(ends) == [pair.name for pair in pairs]
    (first,) = (pair for pair in pairs if pair.producer == "transformer.h.0.ln_1")
    with torch.no_grad():
        read: list[torch.Tensor] = []
        hook = model.transformer.h[0].ln_1.register_forward_hook(lambda m, x, y: read.append(y))
        for batch in batches():
            model(batch)
        hook.remove()
    rows = torch.cat(read).flatten(0, 1)
    assert torch.equal(ends[first.name], torch.stack((rows.amin(0), rows.amax(0))))
    assert int(ends[first.name][1].argmax()) == 3  # the outlier that `outlier_gpt2` makes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_folding_multiplies_both_ends_by_alpha() -> None:
    sim = ready()
    pairs = find_pairs(sim)
    generator = torch.Generator().manual_seed(0)
    alphas = {p.name: torch.rand(p.channels, generator=generator) + 0.5 for p in pairs}
    before = channel_ends(sim.model, pairs, batches())
    fold(sim, pairs, alphas)
    after = channel_ends(sim.model, pairs, batches())
    for name, alpha in alphas.items():
        assert_close(after[name], before[name] * alpha, rtol=1e-4, atol=1e-4)


def test_input_channels_that_share_an_alpha_are_one_channel() -> None:
    sim = simulate(prepare(FAMILIES["llama"]()))
    (pair, *_) = find_pairs(sim, kinds=("v-o",))
    (ends,) = channel_ends(sim.model, [pair], batches()).values()
    assert ends.shape == (2, pair.channels)
    assert pair.channels < len(pair.columns[0])
    assert torch.isfinite(ends).all()
    assert (ends[0] <= ends[1]).all()


def test_a_pair_that_nothing_runs_has_none() -> None:
    sim = ready()
    assert channel_ends(sim.model, find_pairs(sim), []) == {}
    assert channel_ends(sim.model, [], batches()) == {}
