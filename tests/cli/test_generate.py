"""`quadapter run --generation` and `quadapter generate`: text from a shell."""

from pathlib import Path

import pytest

from aimet_quadapter import generate_on_cpu
from aimet_quadapter.cli import main

PROMPT = "def read(self"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the embedded model."""
    output = tmp_path_factory.mktemp("run")
    quick = ["--samples", "2", "--length", "32", "--eval-tokens", "128", "--steps", "2"]
    shape = ["--generation", "24", "48", "--no-preflight", "--no-report"]
    assert main(["run", *quick, *shape, "--no-export", "--output", str(output)]) == 0
    return output / "generation"


def test_the_graphs_generate_from_a_shell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"{PROMPT}{generate_on_cpu(folder, PROMPT, 8)}\n"
    assert len(expected) > len(PROMPT) + 1
    assert main(["generate", str(folder), PROMPT, "--tokens", "8", "--cpu"]) == 0
    assert capsys.readouterr().out == expected


def test_on_the_htp(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_qnn")
    assert main(["generate", str(folder), PROMPT, "--tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)


def test_a_folder_without_graphs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), PROMPT]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_folder_with_other_files_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation" / "mine").write_text("x", encoding="utf-8")
    assert main(["run", "--generation", "24", "48", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "mine" in said.err
    assert "FP32" not in said.out
    assert main(["run", "--generation", "24", "x", "--output", str(tmp_path)]) == 2
    assert "generation" in capsys.readouterr().err
