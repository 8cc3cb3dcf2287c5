import pytest
import torch
from tiny import assert_same, batches, ready, state
from torch.testing import assert_close

from aimet_quadapter.sim.inputs import Sample
from aimet_quadapter.sim.losses import cross_entropy
from aimet_quadapter.sim.sensitivity import site_costs
from aimet_quadapter.sim.sites import Trials, set_range, settings_restored


def test_every_site_has_a_cost_and_the_sim_stays() -> None:
    sim = ready(config_file="htp_v73")
    before, flags = state(sim), [p.requires_grad for p in sim.model.parameters()]
    found = site_costs(sim, batches())
    assert_same(sim, before)
    assert [p.requires_grad for p in sim.model.parameters()] == flags
    assert all(p.grad is None for p in sim.model.parameters())
    assert not any(q._forward_hooks for q in sim.quantizers())
    trials = Trials(sim, batches(), "cross-entropy")
    seen = trials.observe(trials.sites())
    assert {one.site: one.error for one in found} == pytest.approx(
        {name: one.error for name, one in seen.items()}
    )
    costs = [one.cost for one in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0


def test_a_site_that_is_spoiled_costs_more() -> None:
    sim = ready(config_file="htp_v73")
    before = {one.site: one.cost for one in site_costs(sim, batches())}
    (site,) = Trials(sim, batches(), "cross-entropy").sites(["transformer.h.1.add_mlp"])
    low, high = site.quantizer.get_min(), site.quantizer.get_max()
    with settings_restored([site.quantizer]):
        set_range(site.quantizer, float(low) * 40, float(high) * 40)
        after = {one.site: one.cost for one in site_costs(sim, batches())}
    assert after[site.name] > 5 * before[site.name]
    assert max(after, key=after.__getitem__) == site.name


def test_the_cost_is_the_gradient_on_the_rounding() -> None:
    """Of one site, by hand: the gradient of the loss where the site's output is a leaf."""
    sim = ready()
    (site,) = Trials(sim, batches(), "cross-entropy").sites(["transformer.ln_f"])
    sample = Sample.of(batches()[0][:1])
    kept: list[torch.Tensor] = []

    def leaf(_: object, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        kept.extend((args[0].detach(), output.detach().clone().requires_grad_()))
        return kept[1]

    hook = site.quantizer.register_forward_hook(leaf)
    cross_entropy(sim.model, sample).backward()
    hook.remove()
    sim.model.zero_grad()
    x, y = kept
    assert y.grad is not None
    expected = (y.grad * (y - x)).detach().sum(-1).abs().sum()
    found = {one.site: one for one in site_costs(sim, [batches()[0][:1]])}[site.name]
    assert found.bits == 8
    assert_close(torch.tensor(found.cost), expected, rtol=1e-4, atol=0)
