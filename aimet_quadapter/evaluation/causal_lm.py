"""Any causal language model as a harness asks for one: logits, and HuggingFace's `generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from ..models.generation import HuggingFaceGenerator
from .scores import config_number, logits_of


class CausalLM:
    """What a harness asks of a HuggingFace model, for any module: token ids → logits.

    It is no module itself: a harness ties the weights of one and sets its mode, and α of the last
    norm unties them.

    Args:
        module: a HuggingFace causal LM, a prepared decoder, the model of a sim, or any module that
            maps token ids (B, T) to logits (B, T, V).
        end: the token that ends a generated text, where the module has no generation config.

    Attributes:
        config: the module's, or one with its vocabulary where it is not HuggingFace's.
        device: of the first parameter.
        prefix: tokens that the module holds before every text.
    """

    def __init__(self, module: nn.Module, end: int | None) -> None:
        self.module = module
        config = getattr(module, "config", None)
        self.config = config if isinstance(config, PretrainedConfig) else _config_of(module)
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.prefix: tuple[int, ...] = tuple(getattr(module, "prefix", ()))
        settings = getattr(module, "generation_config", None)
        self.generation_config = settings or GenerationConfig(eos_token_id=end)

    @property
    def room(self) -> int | None:
        """Tokens of a text that the module takes at once; None where nothing says so."""
        positions = config_number(self.module, "max_position_embeddings")
        return None if positions is None else positions - len(self.prefix)

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        """Logits (B, T, V) of token ids (B, T), as HuggingFace's models return them."""
        return SimpleNamespace(logits=logits_of(self.module, ids))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """`transformers`' `generate`: same arguments, same tokens.

        A HuggingFace model without quantizers generates by itself, with its cache. Anything else
        computes the whole text for each token.
        """
        simulated = any(hasattr(m, "param_quantizers") for m in self.module.modules())
        if isinstance(self.module, GenerationMixin) and not simulated:
            found: Any = self.module
            return found.generate(input_ids=input_ids, **settings)
        generator: Any = HuggingFaceGenerator(_LastLogits(self))
        generator.generation_config = copy.deepcopy(self.generation_config)
        return generator.generate(input_ids=input_ids, **settings | {"use_cache": False})


class _LastLogits:
    """Logits of the next token, for rows with padding on their left.

    The padding is moved behind a row: no token of a causal model sees what follows it, so a row
    gives what it gives alone, also where a model takes neither a mask nor positions.
    """

    prefix = ()  # positions are those of the module, which counts its own

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.config = model.config

    def parameters(self) -> Iterator[Tensor]:
        """Something that has the module's device, and its type if it has weights."""
        yield from self._model.module.parameters()
        yield torch.zeros(0, device=self._model.device)

    def __call__(self, ids: Tensor, mask: Tensor | None = None, _: Tensor | None = None) -> Tensor:
        """(B, T) → (B, 1, V)."""
        if mask is None:
            return self._model(ids).logits[:, -1:]
        length = ids.shape[1]
        seen = mask.sum(-1, keepdim=True)  # (B, 1)
        place = torch.arange(length, device=ids.device)
        first = ids.gather(1, (place + length - seen) % length).masked_fill(place >= seen, 0)
        logits = self._model(first).logits
        last = (seen - 1)[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, last)


def _config_of(module: nn.Module) -> PretrainedConfig:
    config = PretrainedConfig()
    for name in ("vocab_size", "max_position_embeddings"):
        if (number := config_number(module, name)) is not None:
            setattr(config, name, number)
    return config
