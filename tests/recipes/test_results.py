"""What a result is stamped with, and how often it is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import run
from paper import fingerprint

import aimet_quadapter


def test_a_result_that_is_there_is_read_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.Runner, "measure", lambda _: {"perplexity": {"built-in": 1.5}})
    arguments = ["figure1", "--scale", "small", "--rows", "FP32", "PTQ", "--device", "cpu"]
    arguments += ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    assert run.main(arguments) == 0
    assert "[2/2] small/embedded/figure1/ptq_seed0.json: built-in 1.50" in capsys.readouterr().out
    read: Counter[str] = Counter()
    read_text = Path.read_text

    def record(file: Path, *args: str, **options: str) -> str:
        read[file.name] += 1
        return read_text(file, *args, **options)

    monkeypatch.setattr(Path, "read_text", record)
    assert run.main(arguments) == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert (read["fp32_seed0.json"], read["ptq_seed0.json"]) == (1, 1)


def test_what_comes_after_a_measurement_are_packages_that_exist():
    package = Path(aimet_quadapter.__file__).parent
    assert all((package / name / "__init__.py").is_file() for name in fingerprint.AFTER)


def test_the_stamp_depends_on_the_library_and_on_what_it_measures(monkeypatch):
    read: set[Path] = set()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.add(file) or read_bytes(file))
    fingerprint.sources_sha256.__wrapped__()
    library, package = Path(fingerprint.__file__).parent, Path(aimet_quadapter.__file__).parent
    assert {*library.glob("*.py"), library / "per_tensor_asymmetric.json"} <= read
    assert {package / "config.py", package / "learning" / "calibration.py"} <= read
    assert package / "results" / "page.py" not in read
