"""Small random models that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aimet_quadapter import prepare

torch.set_num_threads(1)  # these models are too small for more: threads would wait on each other

VOCAB = 96


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
