"""A LoRA adapter of the original → the same adapter of the checkpoint with α folded in."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..artifacts.manifest import check_target, new_folder
from ..errors import DataError, UnsupportedModelError
from ..models import PreparedDecoder
from ..pairs.attachment import check_alphas
from ..pairs.pair import Pair, Scale, scales_by_module
from ..transforms.rotation import rotate_weights
from .adapter_folder import CONFIG, WEIGHTS, Adapter, read_adapter, weight_name
from .adapter_proof import compare_adapters
from .checkpoint_folder import prepared_model, refuse_gone


def fold_adapter(
    adapter: str | Path,
    sim: QuantizationSimModel,
    hf_model: PreTrainedModel,
    pairs: Iterable[Pair],
    alphas: Mapping[str, Tensor],
    folder: str | Path,
    *,
    base: str | Path | None = None,
) -> Path:
    """Give an adapter that was trained on a model the form that fits its folded checkpoint.

    Folding makes P W Q of each linear's W: P and Q are the scales of its rows and columns and,
    where the stream was rotated, orthogonal. W + s B A becomes P W Q + s (P B)(A Q), so the adapter
    with P B and A Q computes on the checkpoint of `save_huggingface` what it computed on the
    original. They are found by doing to B A what was done to W and factoring what comes out, which
    has the adapter's rank: exact but for rounding. Where the model is float32, `peft` loads both on
    their bases and their logits are compared before the folder appears.

    Args:
        adapter: folder of `peft`, with adapter_config.json and adapter_model.safetensors: LoRA on
            linears, rank-stabilized or not. (Hu et al., 2021)
        sim: the folded sim; its model says how the stream was rotated.
        hf_model: the HuggingFace model that was prepared, unchanged.
        pairs: the pairs that were folded, as in `QuadapterResult.pairs`.
        alphas: pair name → α, as in `QuadapterResult.alphas`.
        folder: where to; must not exist or be empty.
        base: the folded checkpoint, a folder or a name on the hub, as the adapter is to name its
            base, which `AutoPeftModelForCausalLM` loads. None names none.

    Returns:
        The folder, absolute.

    Raises:
        DataError: not a LoRA adapter of this model.
        MissingRuntimeError: peft is not installed.
        SimError: not the sim of a prepared model.
        ValueError: an α is missing, of the wrong shape or not positive and finite.
        UnsupportedModelError: it has something that scales do not commute with (`REFUSED`),
            or it computes other logits on the folded base.
        FileExistsError: the folder holds something.
    """
    model, chosen = prepared_model(sim), tuple(pairs)
    check_alphas(chosen, alphas)
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite=False)
    source = read_adapter(adapter)
    folded = _folded(_updates(source, hf_model), hf_model, model, scales_by_module(chosen, alphas))
    new: dict[str, Tensor] = {}
    for name, update in folded.items():
        rank = len(source.factors(name)[0])
        left, right = _factors(update, rank)
        new[weight_name(name, "A")], new[weight_name(name, "B")] = right.float(), left.float()
    # What AutoPeftModel loads: the original's revision is none of the checkpoint's.
    named = {"base_model_name_or_path": None if base is None else str(base), "revision": None}
    config = json.dumps(source.config | named, indent=2)
    with new_folder(target) as made:
        (made / CONFIG).write_text(config + "\n", encoding="utf-8")
        _save(new, made)
        if next(hf_model.parameters()).dtype == torch.float32:
            compare_adapters(hf_model, source.folder, model, made)
        _save({name: x.to(source.weights[name].dtype) for name, x in new.items()}, made)
    return target


def check_adapter(
    adapter: Adapter, hf_model: PreTrainedModel, model: PreparedDecoder, shifted: bool
) -> None:
    """Raise for what `fold_adapter` would refuse after all the work.

    Args:
        adapter: as it was read.
        hf_model: HuggingFace's model.
        model: the prepared one.
        shifted: whether `compensate_softmax` is to come.

    Raises:
        DataError: it is of another model.
        UnsupportedModelError: it changes what the shift of `compensate_softmax` goes through.
    """
    _updates(adapter, hf_model)
    if not shifted:
        return
    blocks = enumerate(model.part("blocks"))
    last = {f"{model.path('blocks')}.{i}.{block.path('o')}.weight" for i, block in blocks}
    outputs = {weight.hf.removesuffix(".weight") for weight in model.weights if weight.name in last}
    if changed := sorted(outputs & set(adapter.modules)):
        raise UnsupportedModelError(
            f"{adapter.folder} changes {changed[0]}: compensate_softmax takes a shift off the "
            "values and makes up for it with the weights of the base, not with the adapter's. "
            "Leave compensate_softmax out, or this adapter."
        )


def _save(weights: Mapping[str, Tensor], folder: Path) -> None:
    tensors = {name: x.contiguous() for name, x in weights.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _updates(adapter: Adapter, hf_model: nn.Module) -> dict[str, Tensor]:
    """Module → B A, (out, in), in float64; the factor s stays in the adapter's config."""
    found = {}
    modules = dict(hf_model.named_modules())
    for name in adapter.modules:
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            what = "is none of its modules" if module is None else f"is a {type(module).__name__}"
            raise DataError(
                f"{adapter.folder}: the adapter changes {name}, which {what}: it is of another "
                "model."
            )
        a, b = (x.double() for x in adapter.factors(name))
        shape = module.weight.shape
        expected = shape[::-1] if isinstance(module, Conv1D) else shape
        if (len(b), a.shape[1]) != tuple(expected) or b.shape[1] != len(a):
            raise DataError(
                f"{adapter.folder}: the adapter's update of {name} is {(len(b), a.shape[1])}, the "
                f"weight {tuple(shape)}: it is of another model."
            )
        found[name] = b @ a
    return found


@torch.no_grad()
def _folded(
    updates: Mapping[str, Tensor],
    hf_model: PreTrainedModel,
    model: PreparedDecoder,
    scales: Mapping[str, Sequence[tuple[Scale, Tensor]]],
) -> dict[str, Tensor]:
    """Module → what folding makes of its update, (out, in), in float64.

    The updates take the places of the weights in a model that is never run: as a function it would
    be noise.
    """
    changed: Any = copy.deepcopy(hf_model).float()
    for name, update in updates.items():
        module = changed.get_submodule(name)
        part = update.T if isinstance(module, Conv1D) else update
        module.weight = nn.Parameter(part.float().to(module.weight.device))
    prepared = PreparedDecoder(changed, model.description)
    if model.rotation is not None:
        rotate_weights(prepared, **model.rotation)
        refuse_gone(prepared)
    found: dict[str, Tensor] = {}
    for weight in prepared.weights:
        name = weight.hf.removesuffix(".weight")
        if name not in updates:
            continue
        value = prepared.get_parameter(weight.name).detach().double()
        for scale, alpha in scales.get(weight.name.rpartition(".")[0], ()):
            if scale.parameter == "weight":
                value = scale.apply(value, alpha.detach().double().to(value.device))
        module = changed.get_submodule(name)
        whole = found.setdefault(name, torch.zeros_like(module.weight, dtype=torch.float64))
        replace(weight, offset=0.0).give(value, whole)
    return {
        name: (whole.T if isinstance(changed.get_submodule(name), Conv1D) else whole).cpu()
        for name, whole in found.items()
    }


def _factors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(out, in) of at most a rank → (out, rank) and (rank, in), whose product it is."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(update.shape[1], rank, generator=generator, dtype=update.dtype)
    left = torch.linalg.qr(update @ some).Q  # spans all that the update does
    left = nn.functional.pad(left, (0, rank - left.shape[1]))  # the rank may be above the width
    right = left.T @ update
    share = (right.norm() / max(rank, 1)).sqrt() or 1.0  # of the size of the other
    return left * share, right / share
