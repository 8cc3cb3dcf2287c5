"""The folder of a LoRA adapter: what `peft` writes, and which of it can be folded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError, UnsupportedModelError

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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it was read.

    Attributes:
        folder: where it lies.
        config: adapter_config.json.
        weights: name in the file → tensor.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """Names, in the HuggingFace model, of what it changes."""
        return sorted({n.removeprefix(BEFORE).rpartition(".lora_")[0] for n in self.weights})

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A, (r, in), and B, (out, r), of a module."""
        return self.weights[weight_name(module, "A")], self.weights[weight_name(module, "B")]


def weight_name(module: str, factor: str) -> str:
    """The name that `peft` gives to A or B of a module."""
    return f"{BEFORE}{module}.lora_{factor}.weight"


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter that `peft` saved.

    Raises:
        DataError: it is no LoRA adapter, or a file of it cannot be read.
        UnsupportedModelError: it has something that scales do not commute with (`REFUSED`).
    """
    source = Path(folder).expanduser()
    missing = [name for name in (CONFIG, WEIGHTS) if not (source / name).is_file()]
    if missing:
        raise DataError(
            f"{source} has no {' and no '.join(missing)}: give a folder that peft's "
            "save_pretrained wrote."
        )
    config = _config(source)
    try:
        weights = load_file(source / WEIGHTS)
    except SafetensorError as error:
        raise DataError(f"{source / WEIGHTS} cannot be read ({error}): save it again.") from error
    adapter = Adapter(source, config, weights)
    known = {weight_name(module, factor) for module in adapter.modules for factor in "AB"}
    if other := sorted(weights.keys() - known):
        raise UnsupportedModelError(
            f"{source} holds {other[0]}: only lora_A and lora_B of linears are folded. Weights of "
            "the base are left out by save_pretrained(folder, save_embedding_layers=False)."
        )
    if gone := sorted(known - weights.keys()):
        raise DataError(f"{source} has no {gone[0]}, the other half of a product: save it again.")
    return adapter


def _config(source: Path) -> dict[str, Any]:
    file = source / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise DataError(f"{source} is a {kind} adapter; only LoRA is folded.")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise UnsupportedModelError(f"{source} has {name}: {reason}. It is not folded.")
    begin = str(config.get("init_lora_weights", "")).lower()
    if begin.startswith(CHANGES_BASE):
        raise UnsupportedModelError(
            f"{source} has init_lora_weights={begin!r}: peft changes the base by it when it loads "
            "the adapter. Save it as plain LoRA: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)."
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f"{source} has bias={config['bias']!r}: it changes biases, not only A and B. Train it "
            "with bias='none'."
        )
    return dict(config)
