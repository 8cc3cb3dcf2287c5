"""What is printed where not every character can be: ASCII terminals, pipes under `LC_ALL=C`."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN = {
    "·": "|",
    "×": "x",
    "…": "...",
    "→": "->",
    "–": "-",
    "−": "-",
    "’": "'",
    "±": "+/-",
    "α": "alpha",
    "ⁿ": "^n",
}
"""Characters of our own messages → how they are written in ASCII."""

ERRORS = "quadapter.plain"
"""Name that Python's codecs know `plain` by."""


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for characters that an encoding lacks, as `codecs.register_error` wants it.

    A byte of a file's name that is no text is written as it is; any other character that `PLAIN`
    lacks as a backslash and its number.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # as os.fsdecode hides a byte
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escaped = character.encode("ascii", "backslashreplace").decode("ascii")
    return PLAIN.get(character, escaped), error.start + 1


codecs.register_error(ERRORS, plain)


@contextmanager
def any_terminal() -> Iterator[None]:
    """Let standard output and standard error take every character; a decorator as well."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=ERRORS)
    try:
        yield
    finally:
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)
