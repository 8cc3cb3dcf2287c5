"""A LoRA adapter of the original → the same adapter of the checkpoint with α folded in."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..artifacts.manifest import check_target, new_folder
from ..errors import DataError, UnsupportedModelError
from ..models import PreparedDecoder, prepare
from ..pairs.attachment import check_alphas
from ..pairs.pair import Pair, Scale, scales_by_module
from ..transforms import rotate
from .checkpoint_folder import prepared_model, refuse_gone

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The files of an adapter, as `peft` names them."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of `init_lora_weights` by which the base is another one beside the adapter."""

BEFORE = "base_model.model."
"""What `peft` puts before the name of a module."""

REFUSED = {
    "use_dora": "DoRA's magnitudes are norms of columns, which α changes",
    "modules_to_save": "it brings whole modules, not only A and B",
    "layer_replication": "it runs layers several times",
    "trainable_token_indices": "it brings rows of the embedding, not only A and B",
    "target_parameters": "it changes parameters that are no linear's weight",
}
"""Setting of an adapter → why a model that has it is refused."""


def fold_adapter(
    adapter: str | Path,
    sim: QuantizationSimModel,
    hf_model: PreTrainedModel,
    pairs: Iterable[Pair],
    alphas: Mapping[str, Tensor],
    folder: str | Path,
) -> Path:
    """Give an adapter that was trained on a model the form that fits its folded checkpoint.

    Folding makes P W Q of each linear's W: P and Q are the scales of its rows and columns and,
    where the stream was rotated, orthogonal. W + s B A becomes P W Q + s (P B)(A Q), so the adapter
    with P B and A Q computes on the checkpoint of `save_huggingface` what it computed on the
    original. They are found by doing to B A what was done to W and factoring what comes out, which
    has the adapter's rank: exact but for rounding.

    Args:
        adapter: folder of `peft`, with adapter_config.json and adapter_model.safetensors: LoRA on
            linears, rank-stabilized or not. (Hu et al., 2021)
        sim: the folded sim; its model says how the stream was rotated.
        hf_model: the HuggingFace model that was prepared, unchanged.
        pairs: the pairs that were folded, as in `QuadapterResult.pairs`.
        alphas: pair name → α, as in `QuadapterResult.alphas`.
        folder: where to; must not exist or be empty.

    Returns:
        The folder, absolute.

    Raises:
        DataError: not a LoRA adapter of this model.
        SimError: not the sim of a prepared model.
        ValueError: an α is missing, of the wrong shape or not positive and finite.
        UnsupportedModelError: it has something that scales do not commute with (`REFUSED`).
        FileExistsError: the folder holds something.
    """
    model, chosen = prepared_model(sim), tuple(pairs)
    check_alphas(chosen, alphas)
    source = Path(adapter).expanduser()
    target = Path(folder).expanduser().resolve()
    check_target(target, overwrite=False)
    weights = _read(source)
    updates = _updates(weights, hf_model)
    folded = _folded(updates, hf_model, model, scales_by_module(chosen, alphas))
    new: dict[str, Tensor] = {}
    for name, update in folded.items():
        a, b = (weights[f"{BEFORE}{name}.lora_{x}.weight"] for x in "AB")
        left, right = _factors(update, len(a))
        new[f"{BEFORE}{name}.lora_A.weight"] = right.to(a.dtype)
        new[f"{BEFORE}{name}.lora_B.weight"] = left.to(b.dtype)
    with new_folder(target) as made:
        shutil.copy(source / CONFIG, made / CONFIG)
        save_file({k: v.contiguous() for k, v in new.items()}, made / WEIGHTS, {"format": "pt"})
    return target


def _read(folder: Path) -> dict[str, Tensor]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} has no {' and no '.join(missing)}: give a folder that peft's "
            "save_pretrained wrote."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not JSON ({error}).") from error
    if config.get("peft_type") != "LORA":
        raise DataError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA is folded.")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise UnsupportedModelError(f"{folder} has {name}: {reason}. It is not folded.")
    begin = str(config.get("init_lora_weights", "")).lower()
    if begin.startswith(CHANGES_BASE):
        raise UnsupportedModelError(
            f"{folder} has init_lora_weights={begin!r}: peft changes the base by it when it loads "
            "the adapter. Save it as plain LoRA: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)."
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f"{folder} has bias={config['bias']!r}: it changes biases, not only A and B. Train it "
            "with bias='none'."
        )
    weights = load_file(folder / WEIGHTS)
    other = [n for n in weights if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    if other:
        raise UnsupportedModelError(
            f"{folder} holds {other[0]}: only lora_A and lora_B of linears are folded. Weights of "
            "the base are left out by save_pretrained(folder, save_embedding_layers=False)."
        )
    return weights


def _updates(weights: Mapping[str, Tensor], hf_model: nn.Module) -> dict[str, Tensor]:
    """Module → B A, (out, in), in float64; the factor s stays in the adapter's config."""
    found = {}
    names = {n.removeprefix(BEFORE).rpartition(".lora_")[0] for n in weights}
    modules = dict(hf_model.named_modules())
    for name in sorted(names):
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            what = "is none of its modules" if module is None else f"is a {type(module).__name__}"
            raise DataError(f"the adapter changes {name}, which {what}: it is of another model.")
        a, b = (weights[f"{BEFORE}{name}.lora_{x}.weight"].double() for x in "AB")
        update = b @ a
        shape = module.weight.shape
        if update.shape != (shape[::-1] if isinstance(module, Conv1D) else shape):
            raise DataError(
                f"the adapter's update of {name} is {tuple(update.shape)}, the weight "
                f"{tuple(shape)}: it is of another model."
            )
        found[name] = update
    return found


@torch.no_grad()
def _folded(
    updates: Mapping[str, Tensor],
    hf_model: PreTrainedModel,
    model: PreparedDecoder,
    scales: Mapping[str, Sequence[tuple[Scale, Tensor]]],
) -> dict[str, Tensor]:
    """Module → what folding makes of its update, (out, in), in float64."""
    changed: Any = copy.deepcopy(hf_model).float()
    size = {}
    for name, update in updates.items():
        module = changed.get_submodule(name)
        usual = float(module.weight.abs().max())  # for what `prepare` checks, and float32
        size[name] = float(update.abs().max()) / usual or 1.0
        part = (update.T if isinstance(module, Conv1D) else update) / size[name]
        module.weight = nn.Parameter(part.float().to(module.weight.device))
    prepared = prepare(changed)
    if model.rotation is not None:
        rotate(prepared, **model.rotation)
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
        * size[name]
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
