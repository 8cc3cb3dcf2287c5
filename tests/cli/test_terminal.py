"""Whatever the encoding of the terminal, every line is printed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from aimet_quadapter.cli import main
from aimet_quadapter.cli.terminal import PLAIN, any_terminal


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def written(wrapper: io.TextIOWrapper) -> bytes:
    buffer = wrapper.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


def ascii_streams(monkeypatch: pytest.MonkeyPatch) -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Standard output and standard error that take ASCII alone, from here on."""
    out, err = stream("ascii"), stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_our_own_characters_are_readable_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = ascii_streams(monkeypatch)
    with any_terminal():
        print("α → 10 × 512 · 0 … 9, 2ⁿ ± 1 – é 漢")
        print("ŷ", file=sys.stderr)
    assert written(out) == rb"alpha -> 10 x 512 | 0 ... 9, 2^n +/- 1 - \xe9 \u6f22" + b"\n"
    assert written(err) == b"\\u0177\n"
    assert out.errors == err.errors == "strict"  # as they were
    assert all(text.isascii() for text in PLAIN.values())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_is_no_text_is_written_as_its_bytes(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with any_terminal():
        print(os.fsdecode(b"out-\xe9/model.onnx"))
    assert written(out) == b"out-\xe9/model.onnx\n"


def test_an_encoding_that_has_the_characters_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    with any_terminal():
        print("α × 3")
    assert written(out).decode("utf-8") == "α × 3\n"


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with any_terminal():
        print("α")
    assert sys.stdout.getvalue() == "α\n"


@pytest.mark.parametrize("command", ["run", "report", "compile", "verify"])
def test_help_is_printed_in_ascii(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = ascii_streams(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert written(out).startswith(b"usage: quadapter " + command.encode())


@pytest.mark.parametrize(
    "arguments",
    [["run", "--output"], ["report"], ["compile"], ["verify", "--no-htp"]],
    ids=lambda arguments: arguments[0],
)
def test_an_error_about_any_path_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = ascii_streams(monkeypatch)
    file = tmp_path / "α × é"
    file.touch()
    assert main([*arguments, str(file)]) == 2
    (line,) = written(err).decode("ascii").splitlines()
    assert line.startswith("quadapter: error: ")
    assert r"alpha x \xe9" in line
