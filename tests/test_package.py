import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aimet_quadapter

PACKAGE = Path(aimet_quadapter.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    "errors",
    "config",
    "progress",
    "data",
    "models",
    "prepare",
    "trace",
    "pairs",
    "commute",
    "ranges",
    "attach",
    "proof",
    "discovery",
    "encodings",
    "rows",
    "coverage",
    "blocks",
    "analytic",
    "checkpoint",
    "calibrate",
    "losses",
    "trained",
    "finetune",
    "fold",
    "sites",
    "bits",
    "clipping",
    "manifest",
    "exported",
    "widths",
    "reference",
    "exportable",
    "onnx_files",
    "export",
    "htp",
    "lowering",
    "evaluate",
    "deploy",
    "compare",
    "checks",
    "in_aimet_onnx",
    "verify",
    "static_graphs",
    "export_generation",
    "cached_graphs",
    "generate",
    "compare_generation",
    "default",
    "texts",
    "results",
    "plots",
    "figures",
    "report",
    "pipeline",
    "softmax",
    "cli_deploy",
    "cli",
    "__main__",
)
"""Rule R1: a module imports only what stands above it here."""

ROOT_NAMES = {"__version__"}
"""What a module may take from the package itself, whose other names are lazy."""

PICKLE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PICKLE_CALLS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}


def module_name(path: Path) -> str:
    """The place of a source file in ORDER: files under models/ count as `models`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def package_imports(path: Path) -> Iterator[str]:
    """Names in ORDER that a file of the package imports, wherever in the file it does."""
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
                yield parts[1]


def import_cost() -> tuple[float, set[str]]:
    """Seconds of `import aimet_quadapter` in a new interpreter, and what it loaded."""
    code = (
        "import sys, time; start = time.perf_counter(); import aimet_quadapter; "
        "print(time.perf_counter() - start, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    seconds, *modules = done.stdout.split()
    return float(seconds), set(modules)


def test_import_is_light() -> None:
    seconds = []
    for _ in range(5):
        cost, modules = import_cost()
        assert not {"torch", "aimet_torch", "transformers", "onnx", "numpy"} & modules
        seconds.append(cost)
        if cost <= 0.5:
            break
    assert min(seconds) <= 0.5


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    name = module_name(path)
    if path == PACKAGE / "__init__.py":
        return  # only says where names are; nothing is imported until one is used
    assert name in ORDER, f"{name} has no place in ORDER: say where it stands"
    allowed = set(ORDER[: ORDER.index(name)])
    if name == "models":
        allowed.add("models")
    assert set(package_imports(path)) <= allowed


def test_the_order_names_no_module_twice() -> None:
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", aimet_quadapter.__all__)
def test_a_public_name_is_there(name: str) -> None:
    value = getattr(aimet_quadapter, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(aimet_quadapter)


def test_public_names_are_declared_for_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    ]
    assert sorted(declared) == aimet_quadapter.__all__


def test_a_function_is_not_hidden_by_its_module() -> None:
    code = (
        "import aimet_quadapter.coverage, aimet_quadapter.prepare\n"
        "from aimet_quadapter import coverage, prepare\n"
        "assert callable(coverage) and callable(prepare)\n"
        "assert callable(aimet_quadapter.coverage) and callable(aimet_quadapter.prepare)\n"
    )
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    subprocess.run(command, check=True, cwd=PACKAGE.parent)
    assert importlib.import_module("aimet_quadapter.prepare").prepare is aimet_quadapter.prepare


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quadapt'"):
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
