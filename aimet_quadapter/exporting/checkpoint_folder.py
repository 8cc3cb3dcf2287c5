"""A folded sim → a checkpoint of HuggingFace's own class, without quantizers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from torch import nn
from transformers import PreTrainedModel

from ..artifacts.manifest import check_target, new_folder
from ..errors import SimError, UnsupportedModelError
from ..models import PreparedDecoder
from ..models.proof import compare_logits
from ..pairs.attachment import refuse_attached
from ..sim.values import check_weights
from .exportable import check_perplexities, check_tokenizer
from .model_card import model_card


def save_huggingface(
    sim: QuantizationSimModel,
    hf_model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    pairs: Sequence[str] = (),
    perplexities: Mapping[str, float] | None = None,
    same_function: bool = True,
    notes: str = "",
) -> Path:
    """Write the weights of a folded sim as a HuggingFace checkpoint of the original class.

    `AutoModelForCausalLM.from_pretrained(folder)` computes what the sim does without quantizers, so
    any quantizer of HuggingFace models begins where Quadapter ended. The checkpoint is loaded and
    compared before the folder appears; neither the sim nor `hf_model` is changed. A head that was
    tied to the embedding has a weight of its own then, and the config says so: α of the last norm
    is in it. Biases of `compensate_softmax` are written where the class has them for
    `attention_bias`. A prefix is no weight of HuggingFace's: it is left out, and the model card
    (README.md) names it. What becomes of NaN, another device, half precision: docs/limits.md.

    Args:
        sim: the sim of `prepare(hf_model)`, folded.
        hf_model: the HuggingFace model that was prepared; gives class, config and what a prepared
            model does not hold.
        folder: where to; must not exist or be empty.
        tokenizer: a HuggingFace tokenizer to be saved along.
        pairs: names of the pairs whose α is folded in, for the model card.
        perplexities: name → perplexity, for the model card.
        same_function: whether the model computes what `hf_model` does, for the model card: False
            where weights were trained.
        notes: Markdown for the end of the model card, such as the settings.

    Returns:
        The folder, absolute.

    Raises:
        SimError: not the sim of a prepared model, or a weight is not finite.
        UnfoldedError: the sim carries an α.
        UnsupportedModelError: `hf_model` is another class, or has no place for a bias of the sim
            (`compensate_softmax` made one); or the checkpoint computes other logits.
        DataError: `tokenizer` is no tokenizer.
        ValueError: a perplexity is not a positive number.
        FileExistsError: the folder holds something.
    """
    model = prepared_model(sim)
    check_tokenizer(tokenizer)
    check_perplexities(perplexities)
    if type(hf_model).__name__ != model.hf_class:
        raise UnsupportedModelError(
            f"hf_model is a {type(hf_model).__name__}, the sim is of a {model.hf_class}: pass the "
            "model that was prepared."
        )
    _new_biases(model, hf_model)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite=False)
    checkpoint = checkpoint_of(model, hf_model)
    with new_folder(target) as new:
        checkpoint.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        dtype = next(hf_model.parameters()).dtype
        loaded: Any = type(hf_model).from_pretrained(new, dtype=dtype)
        with remove_all_quantizers(model), model.without_prefix():
            compare_logits(loaded.to(next(model.parameters()).device), model)
        card = model_card(sim, hf_model, pairs, perplexities or {}, same_function, notes)
        (new / "README.md").write_text(card, encoding="utf-8")
    return target


def prepared_model(sim: Any) -> PreparedDecoder:
    """The model of a folded sim; SimError or UnfoldedError for what is none."""
    if not isinstance(sim, QuantizationSimModel) or not isinstance(sim.model, PreparedDecoder):
        raise SimError(
            f"expected the sim of a prepared model, got {type(sim).__name__}: a model that prepare "
            "did not make holds HuggingFace's own weights, and saves itself."
        )
    refuse_attached(sim)
    check_weights(sim.model)
    return sim.model


def check_place(model: PreparedDecoder, hf_model: PreTrainedModel, shifted: bool) -> None:
    """Raise UnsupportedModelError for what `save_huggingface` would refuse after all the work.

    Args:
        model: the prepared model, rotated or not.
        hf_model: HuggingFace's.
        shifted: whether `compensate_softmax` is to come, which gives attention biases.
    """
    _new_biases(model, hf_model)
    if shifted:
        names = {n for n, _ in model.named_parameters()}
        makers = [
            f"{model.path('blocks')}.{i}.{block.path(part)}.bias"
            for i, block in enumerate(model.part("blocks"))
            for part in (block.maker_of_values, "o")
        ]
        _places(model, hf_model, [name for name in makers if name not in names])


def refuse_gone(model: PreparedDecoder) -> None:
    """Raise UnsupportedModelError where a parameter of HuggingFace's model is no longer there."""
    own = {name for name, _ in model.named_parameters()}
    gone = sorted(weight.name for weight in model.weights if weight.name not in own)
    if gone:
        raise UnsupportedModelError(
            f"the model has no {', '.join(gone[:3])}, which {model.hf_class} needs: rotate made "
            "RMSNorms of its LayerNorms. Save the checkpoint of a model that is not rotated."
        )


def _new_biases(model: PreparedDecoder, hf_model: PreTrainedModel) -> dict[str, str]:
    """Biases that HuggingFace's model lacks → their names there, with `attention_bias`.

    Raises:
        UnsupportedModelError: its class has no place for them, or for what became of a norm.
    """
    refuse_gone(model)
    known = {weight.name: weight.hf for weight in model.weights}
    own = [n for n, _ in model.named_parameters() if "_quantizers" not in n]
    new = [n for n in own if n not in known and not n.endswith(".constant")]
    return _places(model, hf_model, new)


def _places(
    model: PreparedDecoder, hf_model: PreTrainedModel, new: Sequence[str]
) -> dict[str, str]:
    """Where biases of the prepared model have their place in HuggingFace's class."""
    if not new:
        return {}
    known = {weight.name: weight.hf for weight in model.weights}
    with torch.device("meta"):
        there = {n for n, _ in _with_attention_bias(hf_model).named_parameters()}
    beside = {n: known.get(f"{n.removesuffix('bias')}weight", "") for n in new}
    names = {n: f"{weight.removesuffix('weight')}bias" for n, weight in beside.items()}
    uses = Counter(known.values())
    missing = [n for n in new if names[n] not in there or uses[beside[n]] != 1]
    if missing:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no place for {', '.join(missing[:3])}: save the "
            "checkpoint before what adds it: compensate_softmax, or rotate of a LayerNorm with a "
            "bias."
        )
    return names


def _with_attention_bias(hf_model: PreTrainedModel) -> Any:
    """A model of the same class, its weights random, with all biases of attention it can have."""
    config = copy.deepcopy(hf_model.config)
    if hasattr(config, "attention_bias"):
        config.attention_bias = True
    return type(hf_model)(config)


@torch.no_grad()
def checkpoint_of(model: PreparedDecoder, hf_model: PreTrainedModel) -> Any:
    """A copy of the HuggingFace model with the prepared model's weights, its head untied.

    Raises:
        UnsupportedModelError: its class has no place for a parameter of the prepared model.
    """
    new_biases = _new_biases(model, hf_model)
    result: Any = copy.deepcopy(hf_model)
    if new_biases:
        result = _with_attention_bias(hf_model).to(hf_model.dtype).eval()
        result.generation_config = hf_model.generation_config
        result.load_state_dict(hf_model.state_dict(), strict=False)
        for name, parameter in result.named_parameters():
            if name.endswith("bias") and name not in hf_model.state_dict():
                parameter.zero_()
    head, embedding = result.get_output_embeddings(), result.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        result.config.tie_word_embeddings = False
    for weight in model.weights:
        weight.give(model.get_parameter(weight.name), result.get_parameter(weight.hf))
    for name, hf in new_biases.items():
        result.get_parameter(hf).copy_(model.get_parameter(name))
    return result
