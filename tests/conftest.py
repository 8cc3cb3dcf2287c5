"""One thread a process and one seed a test: no number depends on cores or on the order of tests."""

from __future__ import annotations

import os
import sys

import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    # Before torch is imported; what a test starts has it too. The models here are too small for
    # more threads, which would wait on each other and on those of the other worker.
    os.environ.setdefault(variable, "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        # A program that an earlier test ran may have set its own.
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
