import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aimet_quadapter

PACKAGE = Path(aimet_quadapter.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROOT_NAMES = {"__version__"}
"""What a module may take from the package itself, whose other names are lazy."""

PICKLE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PICKLE_CALLS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}


PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def order(package: Path) -> list[str]:
    """Modules and packages in a package, in the order that its docstring names them."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return re.findall(r"^- (\w+): ", ast.get_docstring(tree) or "", re.M)


def contents(package: Path) -> set[str]:
    """Modules and packages in a package, as they lie there."""
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in package.glob("*/__init__.py")}


def package_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Names of this package that a file imports, in parts, wherever in the file it does."""
    folder = ("aimet_quadapter", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "aimet_quadapter" and parts[1:] and parts[1] not in ROOT_NAMES:
                yield tuple(parts[1:])


def test_import_is_light() -> None:
    """Seconds are the machine's; what is loaded is not: nothing but what makes the names lazy."""
    code = (
        "import sys; before = set(sys.modules); import aimet_quadapter; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots - sys.stdlib_module_names == {"aimet_quadapter", "lazy_loader"}


def test_a_folder_is_read_without_aimet() -> None:
    """What runs where a model is deployed, or reads results, waits for no aimet_torch."""
    rooms = ("artifacts", "device", "results")
    names = [
        f"aimet_quadapter.{room}.{module}" for room in rooms for module in order(PACKAGE / room)
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'aimet_torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    """Rule R1, for packages and inside each: the order is that of the docstrings."""
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own[-1] == "__init__":
        return  # says where names are; nothing is imported until one is used
    for parts in package_imports(path):
        depth = 0  # of the package that holds both
        while depth < len(own) - 1 and parts[depth] == own[depth]:
            depth += 1
        names = order(PACKAGE.joinpath(*own[:depth]))
        if own[depth] not in names and own[depth - 1] == "families":
            names.append(own[depth])  # nobody builds on it
        assert names.index(parts[depth]) < names.index(own[depth]), ".".join(parts)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_a_package_names_its_modules_in_order(package: Path) -> None:
    if package.name == "families":
        return  # one file an architecture, found by itself; only those built on are named
    names = order(package)
    assert len(set(names)) == len(names)
    assert set(names) == contents(package)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_no_name_that_a_package_hands_on_is_hidden_by_a_module(package: Path) -> None:
    name = ".".join(package.relative_to(PACKAGE.parent).parts)
    handed_on = importlib.import_module(name).__all__
    assert handed_on
    assert not set(handed_on) & contents(package)


@pytest.mark.parametrize("name", aimet_quadapter.__all__)
def test_a_public_name_is_there(name: str) -> None:
    value = getattr(aimet_quadapter, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(aimet_quadapter)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quadapt"):
        _ = aimet_quadapter.quadapt


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_read_or_written_with_pickle(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not PICKLE_MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            root = str(node.module).split(".")[0]
            assert root not in PICKLE_MODULES
            assert not PICKLE_CALLS & {(root, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in PICKLE_CALLS
