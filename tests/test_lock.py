import re
import runpy
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def locked() -> list[Requirement]:
    """One requirement a line of the lock."""
    lines = [line.split("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def applies(requirement: Requirement, python: str, extra: str = "") -> bool:
    """Whether a requirement counts on Linux with this Python."""
    marks = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": extra,
    }
    return requirement.marker is None or requirement.marker.evaluate(marks)


def pins(python: str) -> dict[str, str]:
    """Version of each package that the lock has for this Python."""
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in locked()
        if applies(pin, python)
    }


def installed(name: str) -> str | None:
    """Version of a package in this environment, None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def transitive(name: str, extras: set[str], python: str) -> Iterator[Requirement]:
    """What an installed package requires with these extras on this Python."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if any(applies(requirement, python, extra) for extra in ("", *extras)):
            yield requirement


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """What setup.py requires, with each extra, and setuptools, which builds it."""
    told: dict = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    extras = told["extras_require"].values()
    texts = {*told["install_requires"], *(text for extra in extras for text in extra)}
    return [Requirement(text) for text in sorted(texts | {"setuptools"})]


def test_every_line_pins_one_version() -> None:
    for pin in locked():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), pin
        assert not pin.url
        assert not pin.extras


def test_no_index_and_no_folder_is_named() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert not re.search(r"[/\\@]|^\s*-", text, re.M)


@pytest.mark.parametrize("python", PYTHONS)
def test_a_python_gets_one_version_of_a_package(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in locked() if applies(pin, python)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("python", PYTHONS)
def test_what_setup_py_requires_is_locked_within_its_range(
    python: str, direct: list[Requirement]
) -> None:
    versions = pins(python)
    for requirement in direct:
        if applies(requirement, python):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (requirement, version)


def test_what_those_require_is_locked_too(direct: list[Requirement]) -> None:
    """As far as this environment tells: it may lack a package, or have another version."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions, followed = pins(python), set()
    ends = [requirement for requirement in direct if applies(requirement, python)]
    while ends:
        requirement = ends.pop()
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(versions[name]), (requirement, versions[name])
        step = (name, *sorted(requirement.extras))
        if step not in followed and installed(name) == versions[name]:
            ends += transitive(name, requirement.extras, python)
        followed.add(step)
    assert len(followed) > len(direct)
