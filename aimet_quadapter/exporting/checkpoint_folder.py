"""A folded sim → a checkpoint of HuggingFace's own class, without quantizers."""

from __future__ import annotations

import copy
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
from .exportable import check_tokenizer


def save_huggingface(
    sim: QuantizationSimModel,
    hf_model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
) -> Path:
    """Write the weights of a folded sim as a HuggingFace checkpoint of the original class.

    `AutoModelForCausalLM.from_pretrained(folder)` computes what the sim does without quantizers, so
    any quantizer of HuggingFace models begins where Quadapter ended. The checkpoint is loaded and
    compared before the folder appears; neither the sim nor `hf_model` is changed. A head that was
    tied to the embedding has a weight of its own then, and the config says so: α of the last norm
    is in it. A prefix is no weight of HuggingFace's: it is left out. What becomes of NaN, another
    device, half precision: docs/limits.md.

    Args:
        sim: the sim of `prepare(hf_model)`, folded.
        hf_model: the HuggingFace model that was prepared; gives class, config and what a prepared
            model does not hold.
        folder: where to; must not exist or be empty.
        tokenizer: a HuggingFace tokenizer to be saved along.

    Returns:
        The folder, absolute.

    Raises:
        SimError: not the sim of a prepared model, or a weight is not finite.
        UnfoldedError: the sim carries an α.
        UnsupportedModelError: `hf_model` is another class, or has no place for a bias of the sim
            (`compensate_softmax` made one); or the checkpoint computes other logits.
        DataError: `tokenizer` is no tokenizer.
        FileExistsError: the folder holds something.
    """
    model = _prepared(sim)
    check_tokenizer(tokenizer)
    if type(hf_model).__name__ != model.hf_class:
        raise UnsupportedModelError(
            f"hf_model is a {type(hf_model).__name__}, the sim is of a {model.hf_class}: pass the "
            "model that was prepared."
        )
    _refuse_new_biases(model, hf_model)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite=False)
    checkpoint = _with_weights_of(model, hf_model)
    with new_folder(target) as new:
        checkpoint.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        dtype = next(hf_model.parameters()).dtype
        loaded: Any = type(hf_model).from_pretrained(new, dtype=dtype)
        with remove_all_quantizers(model), model.without_prefix():
            compare_logits(loaded.to(next(model.parameters()).device), model)
    return target


def _prepared(sim: Any) -> PreparedDecoder:
    if not isinstance(sim, QuantizationSimModel) or not isinstance(sim.model, PreparedDecoder):
        raise SimError(
            f"expected the sim of a prepared model, got {type(sim).__name__}: a model that prepare "
            "did not make holds HuggingFace's own weights, and saves itself."
        )
    refuse_attached(sim)
    check_weights(sim.model)
    return sim.model


def _refuse_new_biases(model: PreparedDecoder, hf_model: nn.Module) -> None:
    known = {weight.name for weight in model.weights}
    own = [n for n, _ in model.named_parameters() if "_quantizers" not in n]
    gone = sorted(known - set(own))
    if gone:
        raise UnsupportedModelError(
            f"the model has no {', '.join(gone[:3])}, which {type(hf_model).__name__} needs: "
            "rotate made RMSNorms of its LayerNorms. Save the checkpoint of a model that is not "
            "rotated."
        )
    new = [n for n in own if n not in known and not n.endswith(".constant")]
    if new:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no place for {', '.join(new[:3])}: save the checkpoint "
            "before what adds it: compensate_softmax, or rotate of a LayerNorm with a bias."
        )


@torch.no_grad()
def _with_weights_of(model: PreparedDecoder, hf_model: PreTrainedModel) -> Any:
    """A copy of the HuggingFace model with the prepared model's weights, its head untied."""
    result: Any = copy.deepcopy(hf_model)
    head, embedding = result.get_output_embeddings(), result.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        result.config.tie_word_embeddings = False
    for weight in model.weights:
        weight.give(model.get_parameter(weight.name), result.get_parameter(weight.hf))
    return result
