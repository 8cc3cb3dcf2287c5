"""Settings of each stage: frozen, checked when made, no paths and no model names in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

STARTS = ("ones", "cle", "smoothquant")
OBJECTIVES = ("block", "layer")
INPUTS = ("unquantized", "quantized")
CHOICES = ("block", "kind", "layer")
ROTATIONS = ("hadamard", "random")


def _check(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True)
class CalibrationConfig:
    """Phase 1, calibration layer by layer or block by block.

    Attributes:
        objective: what α lowers the error of: "block", each pair that of its own block, as the
            paper does; "layer", all pairs inside a layer together that of the layer's output. Pairs
            that lie in no layer have their block in any case.
        inputs: what a layer reads while its α is learned: "unquantized", what it reads in the
            unquantized model; "quantized", what the layer before gives with its quantizers and its
            new α. What it is to give stays the unquantized model's. Blocks know the first alone.
        steps: optimizer steps a layer or a block.
        lr: initial learning rate of Adam.
        decay: factor of the learning rate every `decay_every` steps.
        decay_every: steps between two decays; None for a quarter of `steps`.
        parametrization: "exp" trains log α, so α stays positive; "plain" trains α itself, as the
            paper does.
        start: what training starts from, "ones", "cle", "smoothquant", or "best": the one of
            the three with the lowest loss.
        tokens: tokens a step in blocks that work token by token; None takes all. A layer takes a
            whole sample.
        extremes: tokens always in a step for each end of each activation range, because they set
            it.
        head_rows: output rows of a wide consumer (such as lm_head) in a step; None takes all.
            The rows that set the weight's range are always among them.
        keep_best: keep the α with the lowest loss on held-back tokens, the starts included; False
            keeps the last, as the paper does.
        holdout: share of the tokens held back to compare α on.
        choice: what decides which of its α a pair gets, learned or a start: "block", the error
            that was lowered alone; "kind", then for each kind of pair the error of the whole model
            on the last eighth of the samples, which nothing was learned on (on all of them where
            there are less than four); "layer", then for each kind in each quarter of the layers as
            well.
        evaluate_every: steps between two comparisons.
        capture_bytes: inputs of layers or blocks held in memory at a time.
        seed: seed of every random choice.
    """

    objective: str = "block"
    inputs: str = "unquantized"
    steps: int = 40
    lr: float = 0.02
    decay: float = 0.5
    decay_every: int | None = None
    parametrization: str = "exp"
    start: str = "best"
    tokens: int | None = 256
    extremes: int = 6
    head_rows: int | None = 4096
    keep_best: bool = True
    holdout: float = 0.25
    choice: str = "kind"
    evaluate_every: int = 10
    capture_bytes: int = 1 << 29
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.objective in OBJECTIVES, "objective", self.objective, f"one of {OBJECTIVES}")
        _check(self.inputs in INPUTS, "inputs", self.inputs, f"one of {INPUTS}")
        layers = self.objective == "layer" or self.inputs == INPUTS[0]
        _check(layers, "inputs", self.inputs, 'objective="layer" with it')
        _check(self.steps >= 0, "steps", self.steps, "0 or more")
        _check(self.lr > 0, "lr", self.lr, "a positive number")
        _check(0 < self.decay <= 1, "decay", self.decay, "a number in (0, 1]")
        every = self.decay_every
        _check(every is None or every > 0, "decay_every", every, "1 or more, or None")
        kinds = ("exp", "plain")
        _check(self.parametrization in kinds, "parametrization", self.parametrization, str(kinds))
        starts = (*STARTS, "best")
        _check(self.start in starts, "start", self.start, f"one of {starts}")
        _check(self.tokens is None or self.tokens > 0, "tokens", self.tokens, "1 or more, or None")
        _check(self.extremes >= 0, "extremes", self.extremes, "0 or more")
        rows = self.head_rows
        _check(rows is None or rows > 0, "head_rows", rows, "1 or more, or None")
        _check(0 <= self.holdout < 1, "holdout", self.holdout, "a number in [0, 1)")
        _check(self.choice in CHOICES, "choice", self.choice, f"one of {CHOICES}")
        _check(self.evaluate_every > 0, "evaluate_every", self.evaluate_every, "1 or more")
        _check(self.capture_bytes > 0, "capture_bytes", self.capture_bytes, "a positive number")

    @classmethod
    def paper(cls, **changes: Any) -> CalibrationConfig:
        """The paper's settings to the letter (Park et al., 2022, Appendix B)."""
        paper = cls(
            objective="block",
            inputs="unquantized",
            steps=500,
            lr=0.1,
            decay=0.2,
            decay_every=100,
            parametrization="plain",
            start="ones",
            tokens=None,
            extremes=0,
            head_rows=None,
            keep_best=False,
            holdout=0.0,
            choice="block",
            evaluate_every=100,
        )
        return replace(paper, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """Phase 2, end-to-end fine-tuning of α and the quantizer ranges; the weights stay frozen.

    With `lr_weights` above 0 the weights are trained too: quantization-aware training.

    Attributes:
        steps: optimizer steps.
        lr_alpha: initial learning rate of α.
        lr_ranges: initial learning rate of the ranges; 0 leaves them as calibrated.
        lr_weights: initial learning rate of the weights; 0 leaves them as they are.
        log_ranges: train the logarithm of a range's ends: a step is then relative. An absolute
            step of 1e-3 moves nothing on a range of thousands.
        parametrization: "exp" trains log α, "plain" trains α itself.
        loss: "cross-entropy" with the next token, or "distillation" from the unquantized model.
        accumulate: batches whose gradients are summed into a step.
        checkpointing: recompute activations in the backward pass to save memory.
        autocast: "bfloat16" or "float16" for the forward pass, None for the model's own dtype.

    The learning rates fall linearly to 0 over `steps`.
    """

    steps: int = 200
    lr_alpha: float = 1e-2
    lr_ranges: float = 1e-2
    lr_weights: float = 0.0
    log_ranges: bool = True
    parametrization: str = "exp"
    loss: str = "cross-entropy"
    accumulate: int = 1
    checkpointing: bool = False
    autocast: str | None = None

    def __post_init__(self) -> None:
        _check(self.steps > 0, "steps", self.steps, "1 or more")
        _check(self.lr_alpha >= 0, "lr_alpha", self.lr_alpha, "0 or more")
        _check(self.lr_ranges >= 0, "lr_ranges", self.lr_ranges, "0 or more")
        _check(self.lr_weights >= 0, "lr_weights", self.lr_weights, "0 or more")
        rates = self.lr_alpha + self.lr_ranges + self.lr_weights
        _check(rates > 0, "lr_alpha", self.lr_alpha, "some rate above 0")
        kinds = ("exp", "plain")
        _check(self.parametrization in kinds, "parametrization", self.parametrization, str(kinds))
        losses = ("cross-entropy", "distillation")
        _check(self.loss in losses, "loss", self.loss, f"one of {losses}")
        _check(self.accumulate > 0, "accumulate", self.accumulate, "1 or more")
        types = (None, "bfloat16", "float16")
        _check(self.autocast in types, "autocast", self.autocast, f"one of {types}")

    @classmethod
    def paper(cls, **changes: Any) -> FinetuneConfig:
        """The paper's settings to the letter (Park et al., 2022, Appendix B)."""
        paper = cls(
            steps=10_000, lr_alpha=1e-3, lr_ranges=1e-3, log_ranges=False, parametrization="plain"
        )
        return replace(paper, **changes)

    @classmethod
    def qat(cls, **changes: Any) -> FinetuneConfig:
        """Quantization-aware training with the paper's settings: weights and ranges, no α."""
        rates = {"lr_alpha": 0.0, "lr_weights": 1e-5}
        return cls.paper(**rates | changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)
