"""Small random models that several test files share."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from aimet_torch import QuantizationSimModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aimet_quadapter import CalibrationConfig, load_default, prepare, set_ranges
from aimet_quadapter.pairs.attachment import patched, scaled_tensors
from aimet_quadapter.pairs.pair import Pair, scales_by_module

VOCAB = 96
FAST = CalibrationConfig(steps=15, lr=0.05, decay_every=5, evaluate_every=5, tokens=32)
BLOCKS = replace(FAST, choice="block")
"""Each block's best α, whatever the whole model makes of it."""

Build = TypeVar("Build", bound=Callable[..., Any])


def copied(build: Build) -> Build:
    """Build once a process, and give each caller a copy that it may change."""
    once = functools.cache(build)

    @functools.wraps(build)
    def copy_of_it(*arguments: Any, **settings: Any) -> Any:
        return copy_of(once(*arguments, **settings))

    return copy_of_it  # type: ignore[return-value]


def copy_of(built: Any) -> Any:
    """A deep copy. AIMET's graph of a model is a chain, and each link takes a few calls."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return copy.deepcopy(built)
    finally:
        sys.setrecursionlimit(limit)


def gpt2(layers: int = 2, **changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 whose biases and norms are not at their trivial start."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return shaken(GPT2LMHeadModel(GPT2Config(**settings | changes)))


def llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped queries whose biases and norms are not at their trivial start."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return shaken(LlamaForCausalLM(LlamaConfig(**settings | changes)))


def saved(model: Any, folder: Path) -> Path:
    """A HuggingFace model in a folder, with the embedded model's tokenizer."""
    model.save_pretrained(folder)
    load_default()[1].save_pretrained(folder)
    return folder


def one_layer_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of a layer that reads the embedded model's tokens."""
    config = load_default()[0].config
    config.n_layer, config.n_embd, config.n_head = 1, 32, 2
    torch.manual_seed(0)  # a fixture of a module comes before a test's own seed
    return GPT2LMHeadModel(config)


def outlier_gpt2(layers: int = 2) -> nn.Module:
    """The GPT-2, prepared, an outlier channel after each norm."""
    model = gpt2(layers)
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.bias[3] += 300.0
            block.ln_2.weight[5] *= 100.0
    return prepare(model)


def outlier_llama(layers: int = 2) -> nn.Module:
    """The Llama, prepared, an outlier channel after each norm."""
    model = llama(layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 100.0
            layer.post_attention_layernorm.weight[5] *= 100.0
    return prepare(model)


def shaken(model: Any) -> Any:
    """Add noise to every parameter, so that no bias is 0 and no norm's weight is 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def batches(seed: int = 0) -> list[Tensor]:
    """Two batches of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (2, 32), generator=generator) for _ in range(2)]


def decoder_sim(hf: Any, calibrated: bool = False, **settings: Any) -> QuantizationSimModel:
    """The sim of a prepared HuggingFace model, its ranges set on request."""
    model = prepare(hf)
    sim = QuantizationSimModel(model, model.dummy_input(), **settings)
    if calibrated:
        sim.compute_encodings(lambda m: m(tokens()))
    return sim


def make_sim(model: nn.Module, *inputs: Tensor, **settings: Any) -> QuantizationSimModel:
    """The sim of any torch model."""
    return QuantizationSimModel(model.eval(), inputs, **settings)


def simulate(model: Any, config_file: str = "default", **settings: Any) -> QuantizationSimModel:
    """The sim of a prepared model."""
    return QuantizationSimModel(model, model.dummy_input(), config_file=config_file, **settings)


@copied
def ready(
    build: Callable[[], Any] = outlier_gpt2, config_file: str = "default"
) -> QuantizationSimModel:
    """The sim of a prepared model, its ranges set by the batches."""
    sim = simulate(build(), config_file)
    set_ranges(sim, batches())
    return sim


def logits(sim: Any) -> Tensor:
    """The sim's output on a batch that no range was set by."""
    with torch.no_grad():
        return sim.model(batches(seed=5)[0]).as_subclass(Tensor)


def state(sim: Any) -> dict[str, Tensor]:
    """Copies of all that a sim holds, and which quantizers have a range."""
    tensors = {k: v.clone() for k, v in sim.model.state_dict().items() if torch.is_tensor(v)}
    initialized = {n: torch.tensor(q.is_initialized()) for n, q in sim.named_quantizers()}
    return tensors | initialized


def assert_same(sim: Any, before: dict[str, Tensor]) -> None:
    """A sim holds what `state` found before, bit by bit."""
    after = state(sim)
    assert after.keys() == before.keys()
    assert not [n for n, value in before.items() if not torch.equal(after[n], value)]


@contextmanager
def scaled(model: nn.Module, pairs: Iterable[Pair], alphas: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the weights of a model be the scaled ones for a while, whoever reads them."""
    with ExitStack() as stack:
        for name, scales in scales_by_module(pairs, alphas).items():
            module = model.get_submodule(name)
            stack.enter_context(patched(module, scaled_tensors(module, scales)))
        yield
