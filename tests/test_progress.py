import io
import logging
import sys

import pytest

from aimet_quadapter import progress as module
from aimet_quadapter.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_start_and_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aimet_quadapter"):
        assert list(progress(["a", "b"], "letters")) == ["a", "b"]
    first, last = caplog.messages
    assert first == "letters: 0/2"
    assert last.startswith("letters: 2/2 done in")


def test_lines_between_at_intervals(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, logger="aimet_quadapter"):
        assert list(progress(7, "steps")) == list(range(7))
    assert [m.split(" ")[1] for m in caplog.messages] == ["0/7", "2/7", "5/7", "7/7"]


def test_a_generator_has_no_total(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aimet_quadapter"):
        assert list(progress((i for i in range(3)), "stream")) == [0, 1, 2]
    assert caplog.messages[0] == "stream: 0"


def test_a_bar_on_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with caplog.at_level(logging.INFO, logger="aimet_quadapter"):
        assert list(progress(3, "steps")) == [0, 1, 2]
    assert "steps" in screen.getvalue()
    assert not caplog.messages


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_switched_off(
    stream: type[io.StringIO], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    with caplog.at_level(logging.INFO, logger="aimet_quadapter"):
        assert list(progress(3, "steps", enabled=False)) == [0, 1, 2]
    assert not screen.getvalue()
    assert not caplog.messages
