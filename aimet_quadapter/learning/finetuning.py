"""Phase 2: train α and the quantizer ranges end to end; the weights stay frozen.

    min over α, θ of the task loss, θ the ranges of AIMET's own quantizers

Quantization-aware training is the same loop with other parameters: `FinetuneConfig.qat()`.

Ranges are static, set from the calibration data before (Park et al., 2022, §3.2 and Appendix B).

Where `torch.distributed` is initialised a step takes the mean of all ranks' gradients. That is one
all-reduce: Accelerate and DDP average parameters of the model, and what is trained here are none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, patch_attr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .. import checkpoint
from ..config import FinetuneConfig
from ..errors import DataError, SimError
from ..pairs.attachment import attach, attached_modules, detach, replace_alphas
from ..pairs.pair import Pair
from ..progress import progress
from ..sim.checks import check_sim
from ..sim.gradients import by_parts
from ..sim.inputs import Sample
from ..sim.losses import LOSSES
from ..sim.ranges import all_quantizers, restored
from ..sim.samples import stream
from ..sim.weights import KEPT, by_rows, frozen, quantized_once, used_rows
from .ranks import Ranks, joined
from .resume import Resumable, facts_of
from .trained import Trained


@dataclass(frozen=True)
class Finetuning:
    """Result of phase 2: α is attached to the sim, its ranges are trained.

    Attributes:
        alphas: pair name → α by which the sim's weights are scaled now.
        curve: (step, loss) of every step.
        config: the settings.
        seconds: wall time, that of interrupted runs included as far as they were written.
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
    checkpoint_dir: str | Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Finetuning:
    """Train α and ranges on a loss of the whole model.

    The sim's ranges must be set, on weights into which the α of phase 1 are folded. On return
    the trained α is attached: `fold(sim)` puts it into the weights. Weights keep their bits
    unless `lr_weights` is above 0, which makes it quantization-aware training; with `lr_alpha`
    0 or no pairs there is nothing to fold then.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Where `torch.distributed` is initialised with N ranks all of them have to call it, with the same
    sim, pairs, settings and loader: of each N batches a rank takes its own, so a step is that of
    `accumulate` times N batches on one process. All ranks end with the same α and ranges.

    Args:
        sim: an AIMET sim of a causal language model: token ids (B, T) → logits (B, T, V).
        loader: yields batches as the model takes them; gone through again until all steps are
            done.
        pairs: the pairs whose α is trained; none for quantization-aware training.
        alphas: with `parametrization="plain"`, the α already folded: steps are taken on the whole
            α, as in the paper. Not used with "exp", where only ratios count.
        config: settings; `FinetuneConfig.paper()` for the paper's.
        checkpoint_dir: folder for the state now and then, to resume an interrupted run to the bit:
            what is trained, Adam's moments, how far the loader was and the random state it began
            with. A loader that is made anew must yield what it yielded.
        on_step: called before each step with the number of those that were done, to evaluate on
            the way: the sim holds what they trained then, and must be left so. A resumed run calls
            it from where it goes on.

    Raises:
        SimError: ranges are not set; not a sim.
        DataError: the loader is empty or a batch does not fit; the loss is not finite; the folder
            holds an unfinished run with other settings, of another sim or on other batches.
        On any exception, Ctrl-C included, the sim is as it was.
    """
    config = config or FinetuneConfig()
    pairs = tuple(pairs)
    begin = time.perf_counter()
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    with joined() as ranks:
        with ranks.all_or_none():
            check_sim(sim, quantized=not config.lr_weights)
            _check_ranges(sim)
            compared = folder is not None or ranks.size > 1
            facts = facts_of(sim, pairs, alphas or {}, config, ranks.size) if compared else {}
            trained = Trained(sim, pairs, alphas or {}, config)
        ranks.check_same(facts)
        with ranks.entered(
            restored(list(sim.quantizers()), only_on_error=True),
            trained.weights_restored_on_error(),
            frozen(sim.model),
            in_eval_mode(sim.model),
        ):
            try:
                with ranks.all_or_none():
                    attach(sim, pairs, trained.factors())
                    state = Resumable(folder, facts, trained, writes=ranks.first)
                ranks.check_same({"the step to go on from": len(state.curve)})
                curve = _run(sim, loader, pairs, trained, config, state, on_step, ranks)
                detach(sim)
                final = {name: f.detach().clone() for name, f in trained.factors().items()}
                attach(sim, pairs, final)
            except BaseException:
                detach(sim)
                raise
    seconds = state.seconds + time.perf_counter() - begin
    return Finetuning(final, curve, config, seconds)


def _check_ranges(sim: Any) -> None:
    used = {id(op.get_module()) for op in sim.connected_graph.ordered_ops}
    for name, module in sim.named_qmodules():
        missing = [q for q in all_quantizers(module) if not q.is_initialized()]
        if missing and id(module) in used:
            raise SimError(
                f"a quantizer of {name} has no range yet. Run sim.compute_encodings(...) on the "
                "calibration data first (apply_quadapter does it for you)."
            )


def _run(
    sim: Any,
    loader: Iterable[Any],
    pairs: tuple[Pair, ...],
    trained: Trained,
    config: FinetuneConfig,
    state: Resumable,
    on_step: Callable[[int], None] | None,
    ranks: Ranks,
) -> list[tuple[int, float]]:
    trained.require_gradients()
    batches = state.batches(stream(loader, sim.model))
    if len(state.curve) >= config.steps:
        with ranks.all_or_none():
            state.check(batches)
    with _same_for_less(sim, config):
        for step in progress(range(len(state.curve), config.steps), "fine-tuning"):
            with ranks.all_or_none():
                if on_step is not None:
                    replace_alphas(sim, pairs, trained.factors())
                    on_step(step)
                total = 0.0
                drawn = list(islice(batches, config.accumulate * ranks.size))
                for batch in drawn[ranks.rank :: ranks.size]:
                    replace_alphas(sim, pairs, trained.factors())
                    total += _backward(sim.model, batch, config, step)
            if ranks.size > 1:
                tensors = [x for batch in drawn for x in batch.tensors()]
                ranks.check_same({"the batches": checkpoint.fingerprint(None, tensors)})
            total = sum(ranks.told(total)) / ranks.size
            trained.average(ranks)
            with ranks.all_or_none():
                trained.step()
                state.done(step, total, config.steps)
    return state.curve


def _backward(model: nn.Module, batch: Sample, config: FinetuneConfig, step: int) -> float:
    """Add a batch's gradients; its share of the loss."""
    with _autocast(model, config.autocast):
        loss = LOSSES[config.loss](model, batch) / config.accumulate
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(
            f"the loss became {value} at step {step}. Lower lr_alpha, lr_ranges and lr_weights, or "
            "check the fine-tuning data."
        )
    loss.backward()
    return value


@contextmanager
def _same_for_less(sim: Any, config: FinetuneConfig) -> Iterator[None]:
    """What changes time and memory of a step, not its numbers."""
    embeddings = by_rows(sim.model)
    with ExitStack() as stack:
        if not (config.lr_ranges or config.lr_weights):
            others = [*embeddings, *map(sim.model.get_submodule, attached_modules(sim))]
            # Without checkpointing a step holds all quantized weights anyway.
            limit = KEPT if config.checkpointing else math.inf
            stack.enter_context(quantized_once(sim.model, limit, others))
        stack.enter_context(by_parts())
        stack.enter_context(used_rows(embeddings))
        if config.checkpointing:
            stack.enter_context(_recomputed(sim.model))
        yield


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
                    again = partial(recompute, block.forward, use_reentrant=False)
                    stack.enter_context(patch_attr(block, "forward", again))
        yield
