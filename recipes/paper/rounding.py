"""AIMET's AdaRound, each rounded module kept: after SIGKILL the next one is begun, to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from aimet_torch.adaround.adaround_optimizer import AdaroundOptimizer
from torch import Tensor, nn

from aimet_quadapter import checkpoint


class KeptRounding:
    """What is learned of each module, on disk as soon as it is.

    AIMET rounds module after module: it takes the inputs of one from the model whose modules before
    are rounded, and makes an optimizer of its own for each. What one leaves behind is its alpha
    and the random state, so a module with both read again is as it was left.

    Args:
        folder: where to; None keeps nothing.
        mark: fingerprint of all that the rounding depends on. What has another is not read.

    Attributes:
        seconds: of all modules, those of earlier runs included.
        found: names of modules that were read again.
        learned: names of modules that were rounded.
    """

    def __init__(self, folder: Path | None, mark: str) -> None:
        self.folder = folder and folder / f"adaround {mark[:16]}"
        self.mark = mark
        self.seconds = 0.0
        self.found: list[str] = []
        self.learned: list[str] = []
        self._behind = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let AIMET's AdaRound read and write modules for a while.

        Raises:
            RuntimeError: AIMET rounded otherwise, so that nothing was kept.
        """
        own = vars(AdaroundOptimizer)["adaround_module"]
        learn = AdaroundOptimizer.adaround_module
        AdaroundOptimizer.adaround_module = self._module(learn)
        try:
            yield
        finally:
            AdaroundOptimizer.adaround_module = own
        if not self.found and not self.learned:
            raise RuntimeError(
                "AIMET's AdaRound called AdaroundOptimizer.adaround_module for no module, so none "
                "was kept: this release works in another way, or the model has no linear."
            )

    def _module(self, learn: Callable[..., None]) -> Callable[..., None]:
        def adaround_module(
            module: nn.Module, wrapper: Any, model: nn.Module, *args: Any, **kwargs: Any
        ) -> None:
            name = next(n for n, m in model.named_modules() if m is module)
            if self._read(name, wrapper):
                return
            begin = time.perf_counter()
            learn(module, wrapper, model, *args, **kwargs)
            self._write(name, wrapper.alpha, time.perf_counter() - begin)
            self.learned.append(name)

        return adaround_module

    def _read(self, name: str, wrapper: Any) -> bool:
        """Give a module what was learned for it; False where that is not there."""
        stored = checkpoint.load_all(self.folder, name) if self.folder else None
        if self._behind or stored is None or stored[0] != self.mark:
            self._behind = True  # a later module was learned on what this one gave then
            return False
        _, tensors, record = stored
        with torch.no_grad():
            wrapper.alpha.copy_(tensors["alpha"])
        wrapper.use_soft_rounding = False  # as AIMET leaves it
        restore_random(tensors["random"], tensors["numpy"], record["numpy"])
        self.seconds += record["seconds"]
        self.found.append(name)
        return True

    def _write(self, name: str, alpha: Tensor, seconds: float) -> None:
        self.seconds += seconds
        if self.folder is None:
            return
        numbers, state = random_state()
        tensors = {"alpha": alpha, **numbers}
        record = {"seconds": seconds, "numpy": state}
        checkpoint.save_all(self.folder, name, self.mark, tensors, record)


def random_state() -> tuple[dict[str, Tensor], list[Any]]:
    """Torch's and numpy's: AIMET draws samples by either."""
    kind, keys, *rest = numpy.random.get_state()
    numbers = {"random": torch.get_rng_state(), "numpy": torch.tensor(keys.astype("int64"))}
    return numbers, [str(kind), *rest]


def restore_random(random: Tensor, keys: Tensor, rest: list[Any]) -> None:
    """Set what `random_state` gave."""
    torch.set_rng_state(random)
    kind, *others = rest
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *others))
