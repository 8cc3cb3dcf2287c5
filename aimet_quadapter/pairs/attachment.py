"""Put α inside a sim's modules, take it out again.

While α is attached, a module's forward runs on scaled weight and bias: α multiplies before the
weight quantizer, gradients reach α and the quantizer's range, the module's own tensors and
AIMET's quantizers stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryFile
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SimError, UnfoldedError
from ..models import PreparedDecoder
from ..sim.ranges import undone
from ..sim.values import all_finite
from .pair import Pair, Scale, scales_by_module

_MARK = "_quadapter_scales"
"""Attribute of a module that carries α: its list of (scale, α)."""

_OWN_FORWARD = "_quadapter_own_forward"
"""Attribute of such a module: the forward it had in place of its class's, or None."""


def scaled_tensors(
    module: nn.Module, scales: Iterable[tuple[Scale, Tensor]], in_place: Collection[str] = ()
) -> dict[str, Tensor]:
    """Parameter name → the parameter with every scale applied; differentiable in α.

    Args:
        module: the module.
        scales: every (scale, α) that enters it.
        in_place: parameters to write into, without gradients.
    """
    tensors: dict[str, Tensor] = {}
    for scale, alpha in scales:
        name = scale.parameter
        tensor = tensors.get(name, getattr(module, name))
        out = tensor.detach() if name in in_place else None
        tensors[name] = scale.apply(tensor, alpha, out)
    return tensors


@contextmanager
def patched(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module's parameters be other tensors for a while; they may have other shapes."""
    before = {name: module._parameters[name] for name in tensors}
    try:
        module._parameters.update(tensors)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(before)


@contextmanager
def scaled(model: nn.Module, pairs: Iterable[Pair], alphas: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model's parameters be scaled for a while; what it gives is differentiable in α.

    Nothing is checked: for passes that are run many times, `attach` for what stays.
    """
    with ExitStack() as stack:
        for name, scales in scales_by_module(pairs, alphas).items():
            module = model.get_submodule(name)
            stack.enter_context(patched(module, scaled_tensors(module, scales)))
        yield


@contextmanager
def values_restored(
    tensors: Iterable[Tensor], only_on_error: bool = False
) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Give tensors their bits back.

    Args:
        tensors: the tensors to watch over; their copies are in a file of the folder for temporary
            ones (`TMPDIR`), so that a large model is not in memory twice.
        only_on_error: keep the new values unless the context ends with an exception.

    Yields:
        What gives some of them their bits back at once.

    Raises:
        OSError: there is no room for the copies; nothing is changed.
    """
    tensors = list(tensors)
    places: dict[int, int] = {}

    def give_back(some: Iterable[Tensor]) -> None:
        for tensor in some:
            value = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            copies.seek(places[id(tensor)])
            copies.readinto(_bytes(value))
            tensor.data.copy_(value)

    with TemporaryFile() as copies:
        for tensor in tensors:
            places[id(tensor)] = copies.tell()
            copies.write(_bytes(tensor.detach().cpu().contiguous()))
        copies.flush()
        with undone(partial(give_back, tensors), only_on_error):
            yield give_back


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU, as an array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def attach(sim: Any, pairs: Iterable[Pair], alphas: Mapping[str, Tensor]) -> None:
    """Make the sim compute with scaled weights until `fold` or `detach`.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim the pairs were found in.
        pairs: pairs, each with its α in `alphas`.
        alphas: pair name → α of shape (channels,), positive. A parameter stays one: gradients
            reach it.

    Raises:
        UnfoldedError: the sim already carries an α.
        SimError: a scaled weight or bias is NaN or inf.
        ValueError: an α is missing, of the wrong shape, or not positive and finite, or the
            pairs are another model's, or older than a bias of the sim.
    """
    pairs = tuple(pairs)
    refuse_attached(sim)
    check_alphas(pairs, alphas)
    by_name = scales_by_module(pairs, alphas)
    modules = modules_to_scale(sim.model, by_name)
    for name, module in modules.items():
        setattr(module, _MARK, by_name[name])
        setattr(module, _OWN_FORWARD, module.__dict__.get("forward"))
        # A bound method: a deep copy of the sim runs on its own modules and its own α.
        module.forward = MethodType(_scaled_forward, module)


def modules_to_scale(
    model: nn.Module, scales: Mapping[str, Sequence[tuple[Scale, Tensor]]]
) -> dict[str, nn.Module]:
    """`known_modules`, each of them checked before any is touched.

    Args:
        model: a sim's model.
        scales: module name → every (scale, α) that enters it.

    Raises:
        ValueError: as `known_modules`.
        SimError: a scaled weight or bias is NaN or inf.
    """
    modules = known_modules(model, scales)
    for name, module in modules.items():
        finite_scaled_tensors(name, module, scales[name])
    return modules


def known_modules(
    model: nn.Module, scales: Mapping[str, Sequence[tuple[Scale, Tensor]]]
) -> dict[str, nn.Module]:
    """The modules that scales enter, as they were when the pairs were found.

    Args:
        model: a sim's model.
        scales: module name → every (scale, α) that enters it.

    Returns:
        Module name → module.

    Raises:
        ValueError: the model has no such module, or a bias of it is not among the scales.
    """
    modules = {}
    for name in scales:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as e:
            raise ValueError(
                f"the sim has no module {name!r}: the pairs are another model's. Find them in "
                "this sim: find_pairs(sim)."
            ) from e
    for name, module in modules.items():
        rows = [scale for scale, _ in scales[name] if not scale.divide]
        known = getattr(module, "bias", None) is None or any(s.parameter == "bias" for s in rows)
        if rows and not known:
            raise ValueError(
                f"{name} has a bias that it did not have when its pair was found. Find the pairs "
                "again: find_pairs(sim)."
            )
    held = model.held_values() if isinstance(model, PreparedDecoder) else {}
    for constant, maker in held.items():
        made = any(not scale.divide for scale, _ in scales.get(maker, ()))
        if made and constant not in scales:
            raise ValueError(
                f"{maker} makes values that stand beside a prefix, which the model did not have "
                "when its pair was found. Find the pairs again: find_pairs(sim)."
            )
    return modules


@torch.no_grad()
def finite_scaled_tensors(
    name: str, module: nn.Module, scales: Sequence[tuple[Scale, Tensor]]
) -> dict[str, Tensor]:
    """`scaled_tensors` of the module of this name; SimError where one is NaN or inf."""
    tensors = scaled_tensors(module, scales)
    for parameter, value in tensors.items():
        if not all_finite(value):
            raise SimError(
                f"{parameter} of {name} is NaN or inf with α in it: it was before, or α takes it "
                "beyond its type. Check the weights, or take a wider dtype."
            )
    return tensors


def _scaled_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(self, _OWN_FORWARD) or MethodType(type(self).forward, self)
    with patched(self, scaled_tensors(self, getattr(self, _MARK))):
        return forward(*args, **kwargs)


def replace_alphas(sim: Any, pairs: Iterable[Pair], alphas: Mapping[str, Tensor]) -> None:
    """Let the α attached to a sim for these pairs have other values."""
    for name, scales in scales_by_module(pairs, alphas).items():
        setattr(sim.model.get_submodule(name), _MARK, scales)


def detach(sim: Any) -> None:
    """Take every α out of a sim; its weights and quantizers are what they were."""
    for module in _carriers(sim).values():
        own = getattr(module, _OWN_FORWARD)
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own
        delattr(module, _MARK)
        delattr(module, _OWN_FORWARD)


def is_attached(sim: Any) -> bool:
    """Whether the sim carries an α that is not folded."""
    return carries_alpha(sim.model)


def carries_alpha(model: nn.Module) -> bool:
    """Whether a module of a model carries an α that is not folded."""
    return any(hasattr(module, _MARK) for module in model.modules())


def refuse_attached(sim: Any) -> None:
    """Raise UnfoldedError if the sim carries an α, naming where."""
    if is_attached(sim):
        raise UnfoldedError(
            f"the sim already carries α in {', '.join(attached_modules(sim))}. Fold it "
            "(fold(sim)) or take it out (detach(sim)) first."
        )


def attached_modules(sim: Any) -> list[str]:
    """Names of the modules that carry an α."""
    return list(_carriers(sim))


def attached_scales(sim: Any) -> dict[str, list[tuple[Scale, Tensor]]]:
    """Module name → the (scale, α) it carries."""
    return {name: getattr(module, _MARK) for name, module in _carriers(sim).items()}


def _carriers(sim: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in sim.model.named_modules() if hasattr(m, _MARK)}


def check_alphas(pairs: Iterable[Pair], alphas: Mapping[str, Tensor]) -> None:
    """Raise ValueError for an α that is missing, misshapen, not positive or not finite."""
    for pair in pairs:
        if pair.name not in alphas:
            raise ValueError(f"no α for the pair {pair.name!r}: give one, or leave the pair out.")
        alpha = alphas[pair.name].detach()
        if alpha.shape != (pair.channels,):
            raise ValueError(
                f"α of {pair.name!r} has shape {tuple(alpha.shape)}, expected ({pair.channels},)."
            )
        if not bool((alpha > 0).all() and alpha.isfinite().all()):
            worst = float(alpha[~((alpha > 0) & alpha.isfinite())][0])
            raise ValueError(
                f"α of {pair.name!r} holds {worst}: every scale must be positive and finite, or "
                "the pair is not exact."
            )
