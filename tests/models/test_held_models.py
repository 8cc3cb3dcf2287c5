"""Models as people hold them: wrapped, subclassed, pickled, behind another tool's interface."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tiny import decoder_sim, gpt2, llama, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from aimet_quadapter import UnsupportedModelError, prepare

WRAPPED: dict[str, tuple[Any, str]] = {
    "compiled": (torch.compile, r"torch\.compile .*model\._orig_mod"),
    "data parallel": (nn.DataParallel, r"DataParallel.*model\.module"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_refused_with_what_takes_it_out(how: str) -> None:
    wrap, message = WRAPPED[how]
    with pytest.raises(UnsupportedModelError, match=message):
        prepare(wrap(gpt2()))


def test_a_layer_of_another_package_is_named_with_its_package() -> None:
    class Linear(nn.Linear):
        """As an adapter names its own."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * x

    model = llama()
    model.model.layers[0].self_attn.q_proj = Linear(32, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"a Linear of .*merge_and_unload\(\)"):
        prepare(model)


def test_an_adapter_that_still_adds_nothing_is_refused_by_its_weights() -> None:
    class Linear(nn.Linear):
        """As an adapter begins: its second factor is 0."""

        def __init__(self) -> None:
            super().__init__(32, 32, bias=False)
            self.lora_a = nn.Parameter(torch.randn(4, 32))
            self.lora_b = nn.Parameter(torch.zeros(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T

    model = llama()
    model.model.layers[0].self_attn.q_proj = Linear()
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.lora_a.*merge_and_unload\(\)"):
        prepare(model)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_sim_survives_pickling(build: Any) -> None:
    sim = decoder_sim(build(), calibrated=True)
    again = pickle.loads(pickle.dumps(sim))  # noqa: S301  the test's own bytes
    with torch.no_grad():
        assert_close(again.model(tokens()), sim.model(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_state_dict_has_huggingfaces_keys_alone(build: Any) -> None:
    hf = build()
    assert prepare(hf).state_dict().keys() <= hf.state_dict().keys()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_takes_use_cache(use_cache: bool) -> None:
    model, ids = prepare(llama()), tokens(1, 4)
    same = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert_close(model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use_cache), same)


def test_a_tool_that_wants_huggingfaces_output_gets_it() -> None:
    model = prepare(llama())
    behind = model.as_huggingface()
    assert isinstance(behind, PreTrainedModel)
    assert behind.config.vocab_size == model.config.vocab_size
    with torch.no_grad():
        assert_close(behind(tokens()).logits, model(tokens()))


def test_a_sim_is_behind_the_interface_too() -> None:
    sim = decoder_sim(llama(), calibrated=True)
    with torch.no_grad():
        assert_close(sim.model.as_huggingface()(tokens()).logits, sim.model(tokens()))
