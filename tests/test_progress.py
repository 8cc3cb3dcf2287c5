import io
import sys

import pytest

from aimet_quadapter import progress as module
from aimet_quadapter.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(["a", "b"], "letters")) == ["a", "b"]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "letters: 0/2"
    assert last.startswith("letters: 2/2 done in")


def test_lines_between_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert list(progress(7, "steps")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["0/7", "2/7", "5/7", "7/7"]


def test_a_generator_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress((i for i in range(3)), "stream")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[0] == "stream: 0"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress(3, "steps")) == [0, 1, 2]
    assert "steps" in screen.getvalue()
    assert "0/3 done" not in screen.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_switched_off(stream: type[io.StringIO], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    if how == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress(3, "steps", enabled=how == "environment")) == [0, 1, 2]
    assert not screen.getvalue()
