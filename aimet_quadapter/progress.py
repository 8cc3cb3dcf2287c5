"""How far a long loop is, and how long each stage took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Let no loop say how far it is for a while."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


@overload
def progress(items: int, desc: str, *, enabled: bool = True) -> Iterator[int]: ...
@overload
def progress(items: Iterable[T], desc: str, *, enabled: bool = True) -> Iterator[T]: ...
def progress(items: Iterable[T] | int, desc: str, *, enabled: bool = True) -> Iterator[T | int]:
    """Go through `items` and say how far it is.

    On a terminal (standard error) it draws a tqdm bar. Elsewhere it prints lines there: at the
    start, at the end, and every ten seconds between.

    Args:
        items: what to go through, or a number n for `range(n)`.
        desc: what is going on, in a word or two.
        enabled: False says nothing at all; so does the environment variable `TQDM_DISABLE`,
            everywhere.

    Returns:
        An iterator over the same items.
    """
    source: Iterable[T | int] = range(items) if isinstance(items, int) else items
    if not enabled or _SILENT.get() or os.environ.get("TQDM_DISABLE"):
        return iter(source)
    if sys.stderr.isatty():
        return iter(tqdm(source, desc=desc, leave=False, dynamic_ncols=True))
    return _with_lines(source, desc)


def _with_lines(source: Iterable[T], desc: str) -> Iterator[T]:
    total = f"/{len(source)}" if isinstance(source, Sized) else ""
    start = said = time.monotonic()
    done = 0
    _say(f"{desc}: 0{total}")
    for item in source:
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            _say(f"{desc}: {done}{total} after {now - start:.0f} s")
            said = now
        yield item
        done += 1
    _say(f"{desc}: {done}{total} done in {time.monotonic() - start:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Clock:
    """Wall time by stage.

    Attributes:
        seconds: stage → seconds it took so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the context takes to a stage."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - begin
