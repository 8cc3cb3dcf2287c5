"""One method, one function: it changes a sim in place and knows no experiment.

Methods compose by listing their names: `apply(subject, ["cle", "quadapter_bc", "adaround"])`.
Each leaves the sim with its ranges set, so that it can be measured after any of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common.defs import QuantScheme
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor

from aimet_quadapter import (
    CalibrationConfig,
    FinetuneConfig,
    analytic_alphas,
    calibrate,
    finetune,
    fold,
    set_ranges,
)
from aimet_quadapter.checkpoint import fingerprint

from .rounding import KeptRounding, random_state

REFUSED = {
    "omniquant": "AIMET's OmniQuant takes HuggingFace's Llama, Qwen2 and Mistral, trains with the "
    "activation quantizers off, and needs peft",
    "spinquant": "AIMET's SpinQuant takes HuggingFace's Llama, Qwen and Phi-3 before a "
    "sim is made, of a width of 2ⁿ times 1, 12, 20 or 28: not GPT-2, and not SmolLM2-135M (576)",
}
"""AIMET's methods that a user will ask for and that do not apply to the sims made here."""


@dataclass
class Subject:
    """What methods work on.

    Attributes:
        sim: the sim of a prepared model; methods change it.
        samples: calibration samples, each (1, T).
        pairs: the pairs that α is learned for.
        batches: gives the fine-tuning batches from the first, each (B, T).
        calibration: settings of phase 1.
        finetuning: settings of phase 2.
        qat: settings of quantization-aware training.
        adaround_iterations: of AdaRound, for each module.
        adascale_iterations: of AdaScale, for each decoder block.
        checkpoint_dir: where finished pairs of phase 1 and rounded modules of AdaRound are kept.
        tuning_dir: where the state of phase 2 or QAT is kept, which is one run's alone.
        on_step: called before each step of these with the number of those that were done.
        seconds: stage → seconds it took, in an earlier run if it was resumed.
        alphas: pair name → product of the α folded so far.
        curves: "loss" → loss of fine-tuning (step, value), or of every pair's calibration.
    """

    sim: QuantizationSimModel
    samples: list[Tensor]
    pairs: Sequence[Any]
    batches: Callable[[], Iterable[Tensor]] = tuple
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig.paper)
    finetuning: FinetuneConfig = field(default_factory=FinetuneConfig.paper)
    qat: FinetuneConfig = field(default_factory=FinetuneConfig.qat)
    adaround_iterations: int = 10_000
    adascale_iterations: int = 1_500
    checkpoint_dir: Path | None = None
    tuning_dir: Path | None = None
    on_step: Callable[[int], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)


def apply(subject: Subject, names: Sequence[str]) -> None:
    """Apply methods one after the other.

    Raises:
        ValueError: a name is not known, or AIMET's method does not take such a model.
    """
    check(names)
    for name in names:
        METHODS[name](subject)


def check(names: Sequence[str], tuned: bool = True) -> None:
    """Raise ValueError unless every name is a method that can be applied.

    Args:
        names: of methods, in order.
        tuned: whether there is text to fine-tune on.
    """
    for name in names:
        if name in REFUSED:
            raise ValueError(f"{name} cannot be measured here: {REFUSED[name]}.")
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}.")
        if name in TUNING and not tuned:
            raise ValueError(f'{name} learns from fine-tuning text: give the row "finetune": true.')
    for place, name in enumerate(names):
        if name in FREEZING and names[place + 1 :]:
            raise ValueError(
                f"{name} freezes the ranges of the weights, so {names[place + 1]} cannot follow "
                f"it: put {name} last."
            )


TUNING = ("quadapter_ft", "qat")
"""Methods that need fine-tuning batches."""

FREEZING = ("adaround", "adascale", "seqmse")
"""Methods after which the weights have the ranges that they were rounded for."""

ROUNDING_RANGES = QuantScheme.post_training_tf
"""Ranges of the weights that AdaRound rounds: min-max, as the sim's."""


def fp(subject: Subject) -> None:
    """No quantizers: the unquantized model."""
    remove_all_quantizers(subject.sim.model)


def ptq(subject: Subject) -> None:
    """AIMET's ranges on the calibration samples, rounding to nearest."""
    set_ranges(subject.sim, subject.samples)


def cle(subject: Subject) -> None:
    """Cross-layer equalization on our pairs; AIMET's own call finds none in a transformer."""
    _fold(subject, analytic_alphas(subject.sim, subject.samples, subject.pairs, "cle"))


def smoothquant(subject: Subject) -> None:
    """SmoothQuant's scale with migration strength 0.5 on our pairs."""
    _fold(subject, analytic_alphas(subject.sim, subject.samples, subject.pairs, "smoothquant"))


def quadapter_bc(subject: Subject) -> None:
    """Quadapter's phase 1, block-wise calibration."""
    result = calibrate(
        subject.sim, subject.samples, subject.pairs, subject.calibration, subject.checkpoint_dir
    )
    subject.seconds["phase 1"] = sum(r.seconds for r in result.results)
    subject.curves["loss"] = {r.pair.name: [list(p) for p in r.curve] for r in result.results}
    _fold(subject, result.alphas)


def quadapter_ft(subject: Subject) -> None:
    """Quadapter's phase 2: α and ranges end to end, weights frozen."""
    _multiply(subject, _tuned(subject, "phase 2", subject.pairs, subject.finetuning))


def qat(subject: Subject) -> None:
    """Quantization-aware training of weights and ranges; of the weights alone after `fp`."""
    _tuned(subject, "QAT", [], subject.qat)


def adaround(subject: Subject) -> None:
    """AIMET's AdaRound: learned rounding of the weights of every linear."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

    sim = subject.sim
    model = QuantizationSimModel.get_original_model(sim.model)
    parameters = AdaroundParameters(
        subject.samples, len(subject.samples), default_num_iterations=subject.adaround_iterations
    )
    kept = KeptRounding(subject.checkpoint_dir, _rounding_mark(subject, model))
    with tempfile.TemporaryDirectory() as folder, kept.applied():
        rounded = Adaround.apply_adaround(
            model,
            model.dummy_input(),
            parameters,
            folder,
            "adaround",
            default_param_bw=_weight_bits(sim),
            default_quant_scheme=ROUNDING_RANGES,
            default_config_file=sim._config_file,
        )
        own = dict(sim.model.named_parameters())
        with torch.no_grad():
            for name, parameter in rounded.named_parameters():
                own[name].copy_(parameter)
        sim.set_and_freeze_param_encodings(f"{folder}/adaround.encodings")
    subject.seconds["AdaRound"] = kept.seconds
    set_ranges(sim, subject.samples)


def adascale(subject: Subject) -> None:
    """AIMET's AdaScale: learned scales and rounding of the weights, decoder block by block."""
    from aimet_torch.adascale import apply_adascale

    apply_adascale(subject.sim, subject.samples, num_iterations=subject.adascale_iterations)
    set_ranges(subject.sim, subject.samples)


def seqmse(subject: Subject) -> None:
    """AIMET's SeqMSE: the weight range of every linear by the error of its output."""
    from aimet_torch.seq_mse import apply_seq_mse

    apply_seq_mse(subject.sim, subject.samples)
    set_ranges(subject.sim, subject.samples)


METHODS: Mapping[str, Callable[[Subject], None]] = {
    method.__name__: method
    for method in (
        fp,
        ptq,
        cle,
        smoothquant,
        quadapter_bc,
        quadapter_ft,
        qat,
        adaround,
        adascale,
        seqmse,
    )
}
"""Name in an experiment → the method."""


def _fold(subject: Subject, alphas: Mapping[str, Tensor]) -> None:
    fold(subject.sim, subject.pairs, alphas)
    _multiply(subject, alphas)
    set_ranges(subject.sim, subject.samples)


def _tuned(
    subject: Subject, stage: str, pairs: Sequence[Any], config: FinetuneConfig
) -> dict[str, Tensor]:
    """Train, and fold what was trained; its α."""
    result = finetune(
        subject.sim,
        (batch.to(subject.samples[0].device) for batch in subject.batches()),
        pairs,
        subject.alphas,
        config,
        subject.tuning_dir and subject.tuning_dir / stage,
        subject.on_step,
    )
    subject.seconds[stage] = result.seconds
    subject.curves["loss"] = [list(p) for p in result.curve]
    fold(subject.sim)
    return result.alphas


def _multiply(subject: Subject, alphas: Mapping[str, Tensor]) -> None:
    for name, alpha in alphas.items():
        subject.alphas[name] = alpha * subject.alphas.get(name, 1.0)


def _rounding_mark(subject: Subject, model: Any) -> str:
    """Fingerprint of all that AdaRound's result depends on."""
    numbers, rest = random_state()
    file = Path(subject.sim._config_file)
    settings = {
        "iterations": subject.adaround_iterations,
        "bits": _weight_bits(subject.sim),
        "ranges": str(ROUNDING_RANGES),
        "config": file.read_text(encoding="utf-8") if file.is_file() else str(file),
        "numpy": rest,
        "versions": [version("aimet-torch"), version("torch")],
        "state": list(model.state_dict()),
        "device": str(subject.samples[0].device),
    }
    tensors = [*model.state_dict().values(), *subject.samples, *numbers.values()]
    return fingerprint(settings, tensors)


def _weight_bits(sim: QuantizationSimModel) -> int:
    """The one bit width of the sim's linear weights."""
    found = {
        module.param_quantizers["weight"].bitwidth
        for _, module in sim.named_qmodules()
        if isinstance(module, torch.nn.Linear) and module.param_quantizers["weight"] is not None
    }
    if len(found) != 1:
        raise ValueError(f"AdaRound is applied at one weight bit width; the sim has {found}.")
    return int(found.pop())
