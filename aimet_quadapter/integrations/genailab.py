"""Quadapter as a technique of AIMET GenAILab: what its generator feeds to a sim → α folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from aimet_torch.utils import remove_all_quantizers

from ..errors import DataError
from ..pipeline import apply_quadapter
from ..sim.inputs import Sample


class QuadapterTechnique:
    """Phase 1 of Quadapter on a sim of GenAILab's, α folded into its weights, all ranges set.

    A step of a recipe's `backbone`, before SeqMSE or AdaScale. GenAILab's techniques are a closed
    list: docs/quantizers.md says which lines of it make room for one more.
    """

    @classmethod
    def cacheable(cls) -> bool:
        """α is in the weights and ranges of the sim, which GenAILab's cache of a step holds."""
        return True

    @staticmethod
    def apply(
        quantsim: Any,
        generator: Callable[..., Any],
        dataloader: Iterable[Mapping[str, Any]],
        num_iterations: int = 8,
        **kwargs: Any,
    ) -> None:
        """Learn α on what the sim's model is called with, and fold it in.

        Args:
            quantsim: an aimet-torch sim of a causal language model.
            generator: called with a batch's entries by name, it calls the sim's model, once or
                piece by piece.
            dataloader: yields batches: names → tensors and other values.
            num_iterations: batches of it to learn on, at most.
            kwargs: of other techniques; a step of GenAILab's is handed more than its own.

        Raises:
            DataError: no batch, or the generator does not call the sim's model.
            QuadapterError: as `apply_quadapter`; the sim is as it was.
        """
        del kwargs
        apply_quadapter(quantsim, inputs_of(quantsim, generator, dataloader, num_iterations))


def inputs_of(
    quantsim: Any,
    generator: Callable[..., Any],
    dataloader: Iterable[Mapping[str, Any]],
    batches: int,
) -> list[Sample]:
    """What the sim's model is called with while the generator goes through batches, unquantized."""
    seen: list[Sample] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Sample(args, kwargs).map(torch.clone))  # a generator may reuse its caches

    device = getattr(generator, "device", None)
    taken = list(islice(dataloader, batches))
    handle = quantsim.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), remove_all_quantizers(quantsim.model):
            for batch in taken:
                given = Sample((), batch).map(lambda x: x.to(device) if device else x)
                generator(**given.kwargs)
    finally:
        handle.remove()
    if not seen:
        raise DataError(
            f"the generator got {len(taken)} batches and did not call the sim's model. Give "
            "a loader that is not empty, num_iterations of 1 or more, and the generator that was "
            "made with this sim."
        )
    return seen
