"""α → weights: afterwards the sim holds plain weights and AIMET's quantizers, nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnfoldedError
from ..sim.ranges import undone
from .attachment import (
    attached_scales,
    check_alphas,
    detach,
    finite_scaled_tensors,
    is_attached,
    known_modules,
    modules_to_scale,
    scaled_tensors,
    values_restored,
)
from .pair import Pair, scales_by_module


def fold(
    sim: Any,
    pairs: Iterable[Pair] | None = None,
    alphas: Mapping[str, Tensor] | None = None,
) -> None:
    """Put α into the weights and biases of a sim.

    W1 ← A W1, b1 ← A b1, W2 ← W2 A⁻¹. Called with a sim alone it folds the α attached to it; the
    sim's output and the encodings in effect stay exactly the same. Called with pairs and their α
    (of a `Calibration`, say) it folds those: the unquantized function stays the same, ranges
    that were set before fit no more, so call `sim.compute_encodings` afterwards.

    Interrupted, it leaves some modules scaled and others not; `apply_quadapter` and
    `weights_restored(sim, pairs, only_on_error=True)` take that back.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim; its weights are changed in place.
        pairs: pairs to fold; those attached when not given.
        alphas: pair name → α of shape (channels,), positive.

    Raises:
        UnfoldedError: pairs are given while the sim still carries another α.
        SimError: a scaled weight or bias is NaN or inf; the sim is as it was.
        ValueError: an α is missing, of the wrong shape or not positive and finite, or the
            pairs are another model's, or older than a bias of the sim.
    """
    if pairs is None:
        scales = attached_scales(sim)
    else:
        if is_attached(sim):
            raise UnfoldedError(
                "the sim carries an α already. Fold it (fold(sim)) or take it out (detach(sim)) "
                "before folding another."
            )
        pairs = tuple(pairs)
        check_alphas(pairs, alphas or {})
        scales = scales_by_module(pairs, alphas or {})
    modules = modules_to_scale(sim.model, scales)
    with torch.no_grad():
        detach(sim)
        for name, module in modules.items():  # one by one: a head's weights are copied alone
            for parameter, value in scaled_tensors(module, scales[name]).items():
                getattr(module, parameter).data.copy_(value)


@contextmanager
def weights_restored(
    sim: Any, pairs: Iterable[Pair], only_on_error: bool = False
) -> Iterator[None]:
    """Give every tensor that α can touch its bits back, and take an attached α out.

    A bias that a producer or consumer did not have before goes: give all pairs to what undoes
    `compensate_softmax`, which changes those of kind "v-o".

    Args:
        sim: the sim.
        pairs: the pairs whose tensors are watched over.
        only_on_error: keep the new weights unless the context ends with an exception.
    """
    pairs = tuple(pairs)
    without_bias = [m for m in _modules(sim, pairs) if getattr(m, "bias", None) is None]
    with (
        values_restored(parameters_of(sim, pairs), only_on_error),
        undone(partial(_drop_biases, without_bias), only_on_error),
        undone(partial(detach, sim), only_on_error),
    ):
        yield


@contextmanager
def folds_in_turn(
    sim: Any, pairs: Iterable[Pair]
) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Fold one α after the other, each into the weights as they were; these come back at the end.

    Only modules that a new α enters are touched, so that α of a few pairs costs theirs alone.

    Args:
        sim: the sim, without α.
        pairs: all pairs that will be folded.

    Yields:
        What folds the α of all pairs: pair name → α (channels,), in place of the last ones. The
            tensor that a pair has already is not looked at again. It raises as `fold` does; the
            next call then folds anew what was new.

    Raises:
        OSError: there is no room for a copy of the weights; nothing is changed.
    """
    pairs = tuple(pairs)
    last: dict[str, Tensor] = {}
    with values_restored(parameters_of(sim, pairs)) as give_back:

        def fold_these(alphas: Mapping[str, Tensor]) -> None:
            new = [p for p in pairs if p.name not in last or alphas.get(p.name) is not last[p.name]]
            check_alphas(new, alphas)
            scales = scales_by_module(pairs, alphas)
            modules = known_modules(sim.model, scales)
            for pair in new:
                last.pop(pair.name, None)
            for name in sorted({scale.module for pair in new for scale in pair.scales}):
                give_back(modules[name].parameters(recurse=False))
                tensors = finite_scaled_tensors(name, modules[name], scales[name])
                for parameter, value in tensors.items():
                    getattr(modules[name], parameter).data.copy_(value)
            last.update({pair.name: alphas[pair.name] for pair in new})

        yield fold_these


def parameters_of(sim: Any, pairs: Iterable[Pair]) -> list[nn.Parameter]:
    """The tensors that α can touch."""
    return [p for m in _modules(sim, pairs) for p in m.parameters(recurse=False)]


def _modules(sim: Any, pairs: Iterable[Pair]) -> list[nn.Module]:
    """Those that α can touch."""
    names = sorted({s.module for p in pairs for s in p.scales})
    return [sim.model.get_submodule(name) for name in names]


def _drop_biases(modules: Iterable[Any]) -> None:
    for module in modules:
        if getattr(module, "bias", None) is not None:
            module.bias = None
            for quantizers in parameter_quantizers(module):
                quantizers.pop("bias")


def parameter_quantizers(module: Any) -> tuple[Any, ...]:
    """Every table of a quantized module with an entry for each of its parameters."""
    return module.param_quantizers, module._param_pre_quantizers
