import torch
from tiny import outlier_gpt2, simulate, tokens

from aimet_quadapter.sim.stream import largest_by_token


def test_the_largest_of_each_token_in_each_sum() -> None:
    model = outlier_gpt2()
    ids = tokens()
    places, largest = largest_by_token(model, model.residual_sums, ids)
    assert places[0].endswith("add_embeddings")
    assert len(places) == 5  # and two sums in each of two layers
    assert largest.shape == (5, ids.shape[1])
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(places[-1]).register_forward_hook(lambda m, x, y: seen.append(y))
    with torch.no_grad():
        model(ids)
    hook.remove()
    assert torch.equal(largest[-1], seen[0].abs().amax(-1).amax(0))


def test_a_sim_is_read_without_its_quantizers() -> None:
    model = outlier_gpt2()
    sim = simulate(model)
    sim.compute_encodings(lambda quantized: quantized(tokens(seed=1)))
    plain = largest_by_token(model, model.residual_sums, tokens())
    places, largest = largest_by_token(sim.model, model.residual_sums, tokens())
    assert places == plain[0]
    assert torch.equal(largest, plain[1])


def test_no_such_place_is_an_empty_picture() -> None:
    places, largest = largest_by_token(outlier_gpt2(), ["*.nowhere"], tokens())
    assert places == []
    assert largest.numel() == 0
