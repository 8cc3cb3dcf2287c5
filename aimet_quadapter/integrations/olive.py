"""Quadapter as a pass of Microsoft Olive: a HuggingFace model → the same with α folded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.model import HfModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.passes.pytorch.common import inherit_hf_from_hf

from ..cli.fold import DECIDED
from ..cli.run import Run
from ..cli.settings import NESTED, Settings, resolve
from ..errors import DataError, UnsupportedModelError

OWN_CONFIG = Path(__file__).with_name("olive_config.json")
"""The pass as Olive finds it: `olive run --package-config`, where no other pass is needed."""

NOT_TAKEN = (*DECIDED, "model", "adapter")
"""Settings of a run that are Olive's to decide."""

DEFAULTS: dict[str, Any] = {"prefix": "none"}
"""Where the pass differs: the next one reads the folder, and a prefix does not lie there."""


class Quadapter(Pass):
    """Learn one scale per channel and fold it into the weights, for the passes that come after.

    HuggingFace in, HuggingFace out, of the same class, in float32. The function stays what it was;
    what changes is how much a quantizer loses. Parameters are the settings of `quadapter run`
    (docs/settings.md) but for those of the model and the output, and `recipe`, a file of settings.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:  # noqa: ARG003
        found = {"recipe": PassConfigParam(type_=str, description="settings, YAML or JSON")}
        for name, field in Settings.model_fields.items():
            if name not in NOT_TAKEN:
                kind = dict[str, Any] if name in NESTED else field.annotation
                default = DEFAULTS.get(name)  # None: not given, so that a tier or a recipe counts
                found[name] = PassConfigParam(
                    type_=kind, default_value=default, description=field.description
                )
        return found

    def _run_for_config(
        self, model: HfModelHandler, config: Any, output_model_path: str
    ) -> HfModelHandler:
        refuse(model)
        target = Path(output_model_path)
        settings = settings_of(config, model.model_name_or_path, self.host_device, target)
        Run(settings, checkpoint=target).go()
        return inherit_hf_from_hf(model, output_model_path)


def settings_of(config: Any, model: str, device: str | None, target: Path) -> Settings:
    """The settings of the run that a pass is.

    Args:
        config: Olive's, with the parameters of the pass.
        model: folder or hub name.
        device: where Olive's host runs passes, in its words; None where it does not say.
        target: folder of the checkpoint. What the run itself writes lies beside it.

    Raises:
        DataError: a value that no setting has.
    """
    given = config.to_json()
    asked = {k: v for k, v in given.items() if v is not None and k in Settings.model_fields}
    if device and "device" not in asked:
        asked["device"] = {"gpu": "cuda"}.get(str(device).lower(), str(device).lower())
    recipe = Path(given["recipe"]) if given.get("recipe") else None
    output = str(target.with_name(f"{target.name}.run"))
    fixed = {"model": model, "output": output, "export": False, "save_huggingface": True}
    return resolve({**asked, **fixed}, recipe)


def refuse(model: Any) -> None:
    """Raise for a model of Olive's that the pass would read as another one.

    Raises:
        UnsupportedModelError: no HuggingFace model, an adapter over one, a model that is loaded
            quantized, by code of its own, or small for a test.
    """
    if not isinstance(model, HfModelHandler):
        raise UnsupportedModelError(
            f"Quadapter takes a HfModel, got {type(model).__name__}: put it before the passes that "
            "convert or export."
        )
    if model.adapter_path:
        raise UnsupportedModelError(
            f"the model has an adapter, {model.adapter_path}, which computes something else on "
            "folded weights: merge it first (MergeAdapterWeights), or fold it (fold_adapter)."
        )
    loading = model.get_load_kwargs()
    if model.test_model_config:
        loading = {**loading, "test_model_config": model.test_model_config}
    for name in ("quantization_config", "trust_remote_code", "test_model_config"):
        if loading.get(name):
            raise UnsupportedModelError(
                f"the model is loaded with {name}, and α is learned on the float32 model of a "
                "class of transformers: leave it out."
            )


def write_olive_packages(file: str | Path) -> Path:
    """Write a file for `olive run --package-config`: Olive's own passes and Quadapter.

    What is given to --package-config replaces Olive's list of passes, and with `olive_config.json`
    of this package alone no other pass is found.

    Args:
        file: where to; a file that is there is replaced.

    Returns:
        The file, absolute.

    Raises:
        DataError: Olive has a pass of this name.
    """
    own = json.loads(OWN_CONFIG.read_text(encoding="utf-8"))["passes"]
    theirs = Path(OlivePackageConfig.get_default_config_path())
    packages = json.loads(theirs.read_text(encoding="utf-8"))
    if twice := packages["passes"].keys() & own.keys():
        raise DataError(f"{theirs} has {', '.join(sorted(twice))} already: use Olive's.")
    packages["passes"] |= own
    target = Path(file).expanduser().resolve()
    target.write_text(json.dumps(packages, indent=4) + "\n", encoding="utf-8")
    return target
