import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

DATA = {
    "evaluation/default_model/README.md",
    "evaluation/default_model/calibration.txt",
    "evaluation/default_model/config.json",
    "evaluation/default_model/generation_config.json",
    "evaluation/default_model/heldout.txt",
    "evaluation/default_model/model.safetensors",
    "evaluation/default_model/tokenizer.json",
    "evaluation/default_model/tokenizer_config.json",
    "integrations/olive_config.json",
    "py.typed",
    "results/paper.json",
    "results/report.html.jinja",
    "results/result.schema.json",
    "results/run.html.jinja",
    "results/style.css",
}
"""What the package holds besides modules and stubs."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that cannot see the clone, return its stdout."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks: nothing that lies about in the clone gets into a build."""
    folder = tmp_path_factory.mktemp("tracked")
    for name in run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tracked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution, as `python -m build` does it."""
    folder = tmp_path_factory.mktemp("dist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=tracked)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        assert {"README.md", "LICENSE", "pyproject.toml"} <= {
            name.partition("/")[2] for name in archive.getnames()
        }
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, tracked: Path) -> None:
    package = tracked / "aimet_quadapter"
    sources = {str(path.relative_to(package)) for path in package.rglob("*.py*")} - {"py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    assert {path.parts[0] for path in names} == {
        "aimet_quadapter",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    inside = {path for path in names if path.parts[0] == "aimet_quadapter"}
    assert {str(path.relative_to("aimet_quadapter")) for path in inside} == sources | DATA


def test_quadapter_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has only the wheel, and what this one has to offer besides."""
    target = tmp_path / "venv"
    venv.create(target)
    python = target / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
    ]
    run(*install, wheel, cwd=tmp_path)
    site = target / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(ours))

    code = "import aimet_quadapter; print(aimet_quadapter.__file__)"
    where = run(python, "-c", code, cwd=tmp_path).strip()
    assert Path(where) == site / "aimet_quadapter" / "__init__.py"

    few = ["--steps", "2", "--samples", "2", "--eval-tokens", "512"]
    printed = run(target / "bin/quadapter", "run", *few, "--output", "out", cwd=tmp_path)
    assert "Quadapter" in printed
    assert (tmp_path / "out/result.json").is_file()
    assert list((tmp_path / "out/export").glob("*.onnx"))
