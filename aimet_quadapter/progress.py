"""How far a long loop is: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")

LOGGER = logging.getLogger("aimet_quadapter")
SECONDS_BETWEEN_LINES = 10.0


@overload
def progress(items: int, desc: str, *, enabled: bool = True) -> Iterator[int]: ...
@overload
def progress(items: Iterable[T], desc: str, *, enabled: bool = True) -> Iterator[T]: ...
def progress(items: Iterable[T] | int, desc: str, *, enabled: bool = True) -> Iterator[T | int]:
    """Go through `items` and say how far it is.

    On a terminal (standard error) it draws a tqdm bar. Elsewhere it writes lines at level INFO to
    the logger "aimet_quadapter": at the start, at the end, and every ten seconds between.

    Args:
        items: what to go through, or a number n for `range(n)`.
        desc: what is going on, in a word or two.
        enabled: False says nothing at all. The environment variable `TQDM_DISABLE` switches off
            every bar, the logger's level every line.

    Returns:
        An iterator over the same items.
    """
    source: Iterable[T | int] = range(items) if isinstance(items, int) else items
    if not enabled:
        return iter(source)
    if sys.stderr.isatty():
        return iter(tqdm(source, desc=desc, leave=False, dynamic_ncols=True))
    return _with_lines(source, desc)


def _with_lines(source: Iterable[T], desc: str) -> Iterator[T]:
    total = f"/{len(source)}" if isinstance(source, Sized) else ""
    start = said = time.monotonic()
    done = 0
    LOGGER.info("%s: 0%s", desc, total)
    for item in source:
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            LOGGER.info("%s: %d%s after %.0f s", desc, done, total, now - start)
            said = now
        yield item
        done += 1
    LOGGER.info("%s: %d%s done in %.1f s", desc, done, total, time.monotonic() - start)
