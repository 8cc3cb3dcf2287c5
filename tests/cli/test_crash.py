"""Errors that are ours, and Ctrl-C, as a shell sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimet_quadapter.cli import main, run
from aimet_quadapter.cli.crash import NAME


def fail(error: BaseException) -> Any:
    def load(*_: Any) -> None:
        raise error

    return load


def test_an_error_of_ours_is_a_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load", fail(RuntimeError("shapes\ndo not fit")))
    assert main(["run", "--seed", "3", "--output", "a folder"]) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "RuntimeError: shapes do not fit" in err
    assert str(tmp_path / NAME) in err
    report = (tmp_path / NAME).read_text(encoding="utf-8")
    for said in ("run --seed 3 --output 'a folder'", "torch 2", "test_crash.py", "Traceback"):
        assert said in report
    assert "aimet-torch not installed" not in report


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    monkeypatch.setattr(run, "load", fail(RuntimeError("late")))
    assert main(["run", "--output", str(tmp_path)]) == 70
    named = capsys.readouterr().err.partition("ours; ")[2].partition(" says")[0]
    assert "late" in Path(named).read_text(encoding="utf-8")


def test_ctrl_c_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "load", fail(KeyboardInterrupt()))
    assert main(["run", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("quadapter: interrupted\n")
