"""Phase 2: train α and the quantizer ranges end to end; the weights stay frozen.

    min over α, θ of the task loss, θ the ranges of AIMET's own quantizers

Ranges are static, set from the calibration data before (Park et al., 2022, §3.2 and Appendix B).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from aimet_torch.quantization.affine import AffineQuantizerBase
from aimet_torch.utils import in_eval_mode, patch_attr, remove_all_quantizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .attach import attach, detach, replace_alphas
from .config import FinetuneConfig
from .data import Sample, check_sim, stream
from .errors import DataError, SimError
from .pairs import Pair
from .progress import progress
from .ranges import all_quantizers, restored


@dataclass(frozen=True)
class Finetuning:
    """Result of phase 2: α is attached to the sim, its ranges are trained.

    Attributes:
        alphas: pair name → α by which the sim's weights are scaled now.
        curve: (step, loss) of every step.
        config: the settings.
        seconds: wall time.
    """

    alphas: dict[str, Tensor]
    curve: list[tuple[int, float]]
    config: FinetuneConfig
    seconds: float

    def __str__(self) -> str:
        width = max(len(self.curve) // 10, 1)
        first = sum(v for _, v in self.curve[:width]) / width
        last = sum(v for _, v in self.curve[-width:]) / width
        return (
            f"fine-tuning: {self.config.loss} {first:.4f} -> {last:.4f} in {len(self.curve)} "
            f"steps, {self.seconds:.0f} s"
        )


def finetune(
    sim: Any,
    loader: Iterable[Any],
    pairs: Iterable[Pair],
    alphas: Mapping[str, Tensor] | None = None,
    config: FinetuneConfig | None = None,
) -> Finetuning:
    """Train α and ranges on a loss of the whole model.

    The sim's ranges must be set, on weights into which the α of phase 1 are folded. On return
    the trained α is attached: `fold(sim)` puts it into the weights. Weights keep their bits.

    Args:
        sim: an AIMET sim of a causal language model: token ids (B, T) → logits (B, T, V).
        loader: yields batches as the model takes them; gone through again until all steps are
            done.
        pairs: the pairs whose α is trained.
        alphas: with `parametrization="plain"`, the α already folded: steps are taken on the whole
            α, as in the paper. Not used with "exp", where only ratios count.
        config: settings; `FinetuneConfig.paper()` for the paper's.

    Raises:
        SimError: ranges are not set; not a sim.
        DataError: the loader is empty or a batch does not fit; the loss is not finite.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    config = config or FinetuneConfig()
    check_sim(sim)
    _check_ranges(sim)
    pairs = tuple(pairs)
    begin = time.perf_counter()
    trained = _Trained(sim, pairs, alphas or {}, config)
    quantizers = list(sim.quantizers())
    with restored(quantizers, only_on_error=True), _frozen(sim.model), in_eval_mode(sim.model):
        attach(sim, pairs, trained.factors())
        try:
            curve = _run(sim, loader, pairs, trained, config)
            detach(sim)
            final = {name: f.detach().clone() for name, f in trained.factors().items()}
            attach(sim, pairs, final)
        except BaseException:
            detach(sim)
            raise
    return Finetuning(final, curve, config, time.perf_counter() - begin)


def _check_ranges(sim: Any) -> None:
    used = {id(op.get_module()) for op in sim.connected_graph.ordered_ops}
    for name, module in sim.named_qmodules():
        missing = [q for q in all_quantizers(module) if not q.is_initialized()]
        if missing and id(module) in used:
            raise SimError(
                f"a quantizer of {name} has no range yet. Run sim.compute_encodings(...) on the "
                "calibration data first (apply_quadapter does it for you)."
            )


class _Trained:
    """The trained tensors: α as factors on the present weights, and the ends of the ranges."""

    def __init__(
        self, sim: Any, pairs: tuple[Pair, ...], base: Mapping[str, Tensor], config: FinetuneConfig
    ) -> None:
        self.exp = config.parametrization == "exp"
        device = next(sim.model.parameters()).device
        self.alphas: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        for pair in pairs:
            one = torch.ones(pair.channels, device=device)
            self.base[pair.name] = base.get(pair.name, one).to(one)
            start = one.log() if self.exp else self.base[pair.name].clone()
            self.alphas[pair.name] = start.requires_grad_()
        self.ranges = _Ranges(sim, config) if config.lr_ranges else None
        groups: list[dict[str, Any]] = []
        if config.lr_alpha and self.alphas:
            groups.append({"params": list(self.alphas.values()), "lr": config.lr_alpha})
        if self.ranges is not None:
            groups.append({"params": self.ranges.parameters, "lr": config.lr_ranges})
        self.optimizer = torch.optim.Adam(groups)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, 1 - step / config.steps)
        )

    def factors(self) -> dict[str, Tensor]:
        """Pair name → factor on the present weights, differentiable in the trained tensors."""
        if self.exp:
            return {n: a.exp() for n, a in self.alphas.items()}
        return {n: a.clamp(min=1e-4) / self.base[n] for n, a in self.alphas.items()}

    def step(self) -> None:
        """One optimizer step on what the last backward passes left."""
        if self.ranges is not None:
            self.ranges.pull_gradients()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranges is not None:
            self.ranges.push_values()


class _Ranges:
    """The ends of AIMET's ranges as trained tensors, plain or by their logarithm.

    With logarithms an end keeps its sign and moves by a share of itself: θ = ±exp(u), and
    ∂L/∂u = ∂L/∂θ · θ. An end at zero stays there.
    """

    def __init__(self, sim: Any, config: FinetuneConfig) -> None:
        self.log = config.log_ranges
        self.ends = [
            parameter
            for q in sim.quantizers()
            if isinstance(q, AffineQuantizerBase)
            for name, parameter in q.named_parameters(recurse=False)
            if name in ("min", "max") and q.is_overwrite_allowed(name)
        ]
        for end in self.ends:
            end.requires_grad_(True)
        if self.log:
            self.signs = [e.detach().sign() for e in self.ends]
            self.parameters = [e.detach().abs().clamp(min=1e-30).log() for e in self.ends]
        else:
            self.parameters = list(self.ends)

    def pull_gradients(self) -> None:
        """AIMET's gradients → those of the trained tensors."""
        if not self.log:
            return
        for u, end in zip(self.parameters, self.ends, strict=True):
            u.grad = None if end.grad is None else end.grad * end.detach()
            end.grad = None

    @torch.no_grad()
    def push_values(self) -> None:
        """The trained tensors → AIMET's ranges."""
        if not self.log:
            return
        for u, end, sign in zip(self.parameters, self.ends, self.signs, strict=True):
            end.copy_(sign * u.exp())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any parameter of the model; flags come back, gradients are gone."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _run(
    sim: Any,
    loader: Iterable[Any],
    pairs: tuple[Pair, ...],
    trained: _Trained,
    config: FinetuneConfig,
) -> list[tuple[int, float]]:
    if trained.ranges is not None:
        for end in trained.ranges.ends:  # after _frozen
            end.requires_grad_(True)
    batches = stream(loader, sim.model)
    loss_of = _LOSSES[config.loss]
    curve = []
    with _recomputed(sim.model) if config.checkpointing else nullcontext():
        for step in progress(config.steps, "fine-tuning"):
            total = 0.0
            for _ in range(config.accumulate):
                replace_alphas(sim, pairs, trained.factors())
                with _autocast(sim.model, config.autocast):
                    loss = loss_of(sim.model, next(batches)) / config.accumulate
                if not math.isfinite(float(loss)):
                    raise DataError(
                        f"the loss became {float(loss)} at step {step}. Lower lr_alpha and "
                        "lr_ranges, or check the fine-tuning data."
                    )
                loss.backward()
                total += float(loss)
            trained.step()
            curve.append((step, total))
    return curve


def _autocast(model: nn.Module, dtype: str | None) -> Any:
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, getattr(torch, dtype))


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """Recompute the entries of the model's outermost module lists in the backward pass."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList)
        and m
        and all(e is not None and any(e.children()) for e in m)
    ]
    inner = {id(x) for blocks in lists for e in blocks for x in e.modules()}
    with ExitStack() as stack:
        for blocks in lists:
            if id(blocks) not in inner:
                for block in blocks:
                    stack.enter_context(patch_attr(block, "forward", _recompute(block.forward)))
        yield


def _recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return recompute(forward, *args, use_reentrant=False)

    return wrapper


def _cross_entropy(model: nn.Module, sample: Sample) -> Tensor:
    """Mean negative log-likelihood of each next token that is not padding."""
    logits = model(*sample)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), _next_tokens(sample).flatten())


def _distillation(model: nn.Module, sample: Sample) -> Tensor:
    """KL(unquantized ‖ quantized) of the next-token distributions, mean over the tokens."""
    with torch.no_grad(), remove_all_quantizers(model):
        teacher = F.log_softmax(model(*sample)[:, :-1].float(), -1)
    student = F.log_softmax(model(*sample)[:, :-1].float(), -1)
    kept = _next_tokens(sample) != -100
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)[kept].mean()


def _next_tokens(sample: Sample) -> Tensor:
    ids = sample[0]
    targets = ids[:, 1:].clone()
    mask = sample[1] if len(sample) > 1 else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        targets[(mask[:, 1:] == 0) | (mask[:, :-1] == 0)] = -100
    return targets


_LOSSES: dict[str, Callable[[nn.Module, Sample], Tensor]] = {
    "cross-entropy": _cross_entropy,
    "distillation": _distillation,
}
