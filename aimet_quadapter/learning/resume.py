"""Phase 2 on disk: after Ctrl-C or SIGKILL it goes on at a step that was written, to the bit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..config import FinetuneConfig
from ..errors import DataError
from ..pairs.pair import Pair
from ..sim.identity import identity
from ..sim.inputs import Sample
from .trained import Trained

FILE = "phase 2"
"""Name of the checkpoint."""

SECONDS = 10.0
"""Between two writes, at least; and twenty times what a write takes."""


def facts_of(
    sim: Any,
    pairs: tuple[Pair, ...],
    base: Mapping[str, Tensor],
    config: FinetuneConfig,
    processes: int = 1,
) -> dict[str, Any]:
    """What phase 2 depends on, by what a user calls it, but for its data."""
    settings, tensors = identity(sim)
    ends = [p for q in sim.quantizers() for p in q.parameters()]
    alphas = [base[p.name] for p in pairs if p.name in base]
    return asdict(config) | {
        "the model, its weights and ranges": checkpoint.fingerprint(settings, [*tensors, *ends]),
        "the pairs and their α": checkpoint.fingerprint([p.name for p in pairs], alphas),
        "processes": processes,
    }


class Resumable:
    """What phase 2 writes and reads again.

    Args:
        folder: where to; None writes nothing.
        facts: what `facts_of` gave before the first step.
        trained: what is trained.
        writes: False writes nothing and reads what another rank wrote.

    Attributes:
        curve: (step, loss) of each step that was done.
        seconds: that the runs before this one took, as far as they were written.

    Raises:
        DataError: the folder holds an unfinished phase 2 that differs in something.
    """

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        trained: Trained,
        writes: bool = True,
    ) -> None:
        self.folder = folder
        self.writes = writes
        self.facts = dict(facts)
        self.trained = trained
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.random = torch.get_rng_state()  # a loader that shuffles draws its order from it
        self._digest = hashlib.sha256()
        self._expected = ""
        self._batches = 0
        self._begin = self._written = time.monotonic()
        self._pause = SECONDS
        if folder is not None:
            self._load(folder)

    def batches(self, stream: Iterator[Sample]) -> Iterator[Sample]:
        """The batches from where the last run was, those before gone through and compared.

        Raises:
            DataError: they are not those of the run that was interrupted.
        """
        skipped = self._batches
        if skipped:
            torch.set_rng_state(self.random)
        for number, batch in enumerate(stream, 1):
            if self.folder is not None:
                for x in batch.tensors():
                    self._digest.update(checkpoint.fingerprint(None, [x]).encode())
            if number == skipped and self._digest.hexdigest() != self._expected:
                raise DataError(self._other("the batches are not the same"))
            if number > skipped:
                self._batches = number
                yield batch

    def check(self, batches: Iterator[Sample]) -> None:
        """Of a run that was finished: go through its batches, and one more, and compare them."""
        next(batches)

    def done(self, step: int, loss: float, steps: int) -> None:
        """Note a step; write now and then, and after the last."""
        self.curve.append((step, loss))
        now = time.monotonic()
        if (
            self.folder is None
            or not self.writes
            or (now - self._written < self._pause and step + 1 < steps)
        ):
            return
        record = {
            "facts": self.facts,
            "curve": self.curve,
            "seconds": self.seconds + now - self._begin,
            "batches": self._batches,
            "data": self._digest.hexdigest(),
        }
        tensors = self.trained.state() | {"random": self.random}
        checkpoint.save_all(self.folder, FILE, FILE, tensors, record)
        self._written = time.monotonic()
        self._pause = max(SECONDS, 20 * (self._written - now))

    def _load(self, folder: Path) -> None:
        stored = checkpoint.load_all(folder, FILE)
        if stored is None:
            return
        _, tensors, record = stored
        facts = record["facts"]
        differing = [k for k in self.facts if facts.get(k) != self.facts[k]]
        if differing:
            if len(record["curve"]) == facts.get("steps"):
                return  # it was finished: nothing is lost
            first = differing[0]
            both = f"{facts.get(first)!r} there, {self.facts[first]!r} here"
            said = f"{first} differs" + ("" if first.startswith("the ") else f" ({both})")
            raise DataError(self._other(said))
        self.curve = [(int(step), float(loss)) for step, loss in record["curve"]]
        self.seconds = record.get("seconds", 0.0)
        self.random = tensors.pop("random")
        self.trained.load(tensors, len(self.curve))
        self._batches, self._expected = record["batches"], record["data"]

    def _other(self, reason: str) -> str:
        assert self.folder is not None
        return (
            f"{checkpoint.path_of(self.folder, FILE)} holds phase 2 of another run: {reason}. Give "
            "the same settings and data to go on with it, another folder, or delete this file."
        )
