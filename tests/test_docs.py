"""Pages: their blocks run; commands, options, paths, names and links in them are there."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from aimet_torch import QuantizationSimModel

from aimet_quadapter import cli, default_text, load_default, prepare
from aimet_quadapter.cli.settings import SHORT, Settings
from aimet_quadapter.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
SOURCES = sorted(
    file
    for folder in ("aimet_quadapter", "benchmarks", "docs", "recipes", "tests")
    for file in (ROOT / folder).rglob("*.py")
)

NOT_RUN = {
    "bits.md": ["site      "],  # what choose_ranges and assign_bits print
    "data.md": ["TEXT_DIR/"],  # a folder's files
    "deployment.md": [
        "aimet_quadapter.errors.CompileError: ",
        "qairt-converter ",  # Qualcomm's SDK
        "hub.submit_compile_job(",  # an account with Qualcomm
    ],
    "generation.md": [" The default value "],  # what the embedded model writes
    "quantizers.md": ["# GenAILab/"],  # which is in no package
}
"""Page → beginnings of its `text` blocks without a command: what nothing here can run."""

FOREIGN = {"--float_fallback", "--no-deps", "--package-config"}
"""Options of other programs that a page names by themselves."""

FOREIGN_COMMANDS = {"export", "olive", "pip"}
"""What a shell block calls besides our own programs."""

EXAMPLES = {"aimet_quadapter/models/families/arcee.py"}
"""Paths of files that a page tells its reader to write."""

HTP_PAGES = {"deployment.md", "export.md", "generation.md"}
"""Pages whose blocks compile for the HTP."""

OLIVE_PAGES = {"quantizers.md"}
"""Pages whose blocks need Microsoft Olive."""


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line and text of each block of a language, of those in HTML comments too."""
    text = read(page)
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, block.start(1)), block[1]


# ---------------------------------------------------------------------------------- Python


def of_the_example() -> dict[str, Any]:
    """The names of README's example, with a small random model in place of the embedded one."""
    _, tokenizer = load_default()
    hf_model = tiny.gpt2(layers=1, vocab_size=len(tokenizer), n_positions=512)
    ids, test_ids = (
        tokenizer(default_text(part)[:4000], return_tensors="pt", verbose=False).input_ids[:, :256]
        for part in ("calibration", "heldout")
    )
    model = prepare(hf_model)
    return {
        "hf_model": hf_model,
        "tokenizer": tokenizer,
        "ids": ids,
        "calib_loader": ids.reshape(4, 1, 64),
        "test_ids": test_ids,
        "model": model,
        "sim": QuantizationSimModel(model, model.dummy_input(), config_file="htp_v73"),
    }


def example() -> str:
    (block,) = (block for _, block in blocks(README, "python"))
    return block


def test_the_example_is_short() -> None:
    assert len(example().strip().splitlines()) <= 15


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    # One thread: beside another worker of pytest, two would wait on each other.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", example()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert len(list(tmp_path.rglob("*.encodings"))) == 1
    assert list(tmp_path.rglob("*.onnx"))


def test_pages_use_the_names_of_the_example() -> None:
    tree = ast.parse(example())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    assigned = {n.id for n in found if isinstance(n.ctx, ast.Store)}
    assert assigned == of_the_example().keys()


@pytest.mark.parametrize("page", names([p for p in PAGES[1:] if any(blocks(p, "python"))]))
def test_the_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path(page).name in HTP_PAGES:
        pytest.importorskip("onnxruntime_qnn", reason="the HTP backend is not installed")
    if Path(page).name in OLIVE_PAGES:
        pytest.importorskip("olive", reason="Olive is not installed: pip install '.[olive]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AIMET_ONNX_PYTHON", raising=False)
    known, path = dict(FAMILIES), ROOT / page
    torch.manual_seed(0)
    namespace = {"__name__": path.stem, **of_the_example()}
    try:
        for line, block in blocks(path, "python"):
            exec(compile("\n" * line + block, str(path), "exec"), namespace)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)


@pytest.mark.parametrize("page", names(PAGES))
def test_every_block_says_what_it_is(page: str) -> None:
    fences = re.findall(r"^ *```(.*)$", read(ROOT / page), re.M)
    assert set(fences[1::2]) <= {""}
    assert set(fences[::2]) <= {"python", "bash", "text", "json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_text_that_is_not_run_is_known(page: Path) -> None:
    texts = [block for _, block in blocks(page, "text") if not block.startswith("$ ")]
    expected = NOT_RUN.get(page.name, [])
    assert len(texts) == len(expected)
    for text, start in zip(texts, expected, strict=True):
        assert text.startswith(start)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_json_is_json(page: Path) -> None:
    for _, block in blocks(page, "json"):
        assert json.loads(block)


# -------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Arguments were taken: the program need not go on."""


OURS = r"quadapter|python -m aimet_quadapter|python (?:recipes|benchmarks)/\w+\.py|make"


def lines_of(shell: str) -> list[str]:
    return [line.strip() for line in shell.replace("\\\n", " ").splitlines() if line.strip()]


def commands(path: Path) -> Iterator[str]:
    """Commands in a page's blocks and code spans, or in a program's docstring."""
    text = read(path)
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        shell = re.sub(r"^(?!    ).*$", "", docstring, flags=re.M)
        yield from (line for line in lines_of(shell) if re.match(rf"(?:{OURS}) ", line))
        return
    for _, block in blocks(path, "bash"):
        yield from lines_of(block)
    for _, block in blocks(path, "text"):
        yield from (line[2:] for line in lines_of(block) if line.startswith("$ "))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(rf"(?:{OURS})\s", span):
            yield " ".join(span.split())


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a command's arguments to the program's own parser, or look its targets up."""
    program, *given = (word for word in shlex.split(command, comments=True) if word != "…")
    if program == "make":
        targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.M)
        assert {word for word in given if "=" not in word} <= {*targets}, command
    elif program == "python":
        program, *given = given[1:] if given[0] == "-m" else given
        take(program, given, monkeypatch)
    elif program == "torchrun":
        take("quadapter", given[given.index("aimet_quadapter") + 1 :], monkeypatch)
    elif program == "quadapter":
        take(program, given, monkeypatch)
    else:
        assert program in FOREIGN_COMMANDS, command


def take(program: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program; it ends when it has taken its arguments."""
    ends_itself = True
    if program == "recipes/run.py":
        given = [*given, "--list"]  # finds experiments, rows and settings, and measures nothing
    elif program.endswith("quadapter") and len(given) == 1:
        given = [*given, "--help"]  # the name of a command
    else:
        ends_itself = False
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any) -> argparse.Namespace:
        found = real(parser, *args)
        if ends_itself:
            return found
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *given])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.syspath_prepend(str((ROOT / program).parent))
        with pytest.raises(SystemExit if ends_itself else Parsed) as end:
            start(program)
    assert not ends_itself or not end.value.code, given


def start(program: str) -> None:
    """Run a program in this process, as a shell would."""
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        cli.main()


PROGRAMS = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


@pytest.mark.parametrize("path", names([*PAGES, ROOT / "CHANGELOG.md", *PROGRAMS]))
def test_commands_have_the_options_they_are_given(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in commands(ROOT / path):
        check(command, monkeypatch)


def test_commands_are_found_and_wrong_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 40
    for wrong in (
        "quadapter run --no-such-option",
        "quadapter compile --htp-arch 73",
        "quadapter copy",
        "python recipes/run.py table9/gpt2",
        "python recipes/decoder.py --sites some",
        "make no-such-target",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(wrong, monkeypatch)


def options() -> set[str]:
    """Every option in the source of a program of ours."""
    programs = [*(ROOT / "recipes").rglob("*.py"), *(ROOT / "aimet_quadapter/cli").glob("*.py")]
    found = {o for path in programs for o in re.findall(r'"(--[a-z][\w-]*)"', read(path))}
    keys = [key.replace("_", "-") for key in (*Settings.model_fields, *SHORT)]
    return found | {f"--{no}{key}" for key in keys for no in ("", "no-")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_prose_are_there(page: Path) -> None:
    named = re.findall(r"`(--[\w-]+)", read(page))
    assert set(named) - options() - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_named_are_there(page: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(read(ROOT / "setup.py"))) if isinstance(n, ast.keyword)]
    (extras,) = (n.value for n in calls if n.arg == "extras_require")
    assert isinstance(extras, ast.Dict)
    there = {key.value for key in extras.keys if isinstance(key, ast.Constant)}
    named = re.findall(r"(?:aimet_quadapter|'\.)\[([\w,]+)\]", read(page))
    assert {extra for group in named for extra in group.split(",")} <= there


# --------------------------------------------------------------------- paths, names, links


@pytest.mark.parametrize("path", names([*PAGES, ROOT / "CHANGELOG.md", *SOURCES]))
def test_paths_that_are_named_exist(path: str) -> None:
    pattern = r"(?<![\w/.\-])(?:aimet_quadapter|benchmarks|docs|recipes|tests)/[\w./*\-]*[\w*/]"
    named = {name for name in re.findall(pattern, read(ROOT / path)) if name not in EXAMPLES}
    assert sorted(name for name in named if not any(ROOT.glob(name.rstrip("/")))) == []


PACKAGES = {path.parent.name for path in (ROOT / "aimet_quadapter").glob("*/__init__.py")}


def exists(dotted: str) -> bool:
    """Whether a name with dots is that of a module, or of something in one or in a sim."""
    parts = dotted.removeprefix("aimet_quadapter.").split(".")
    if parts[0] == "sim" and holds(QuantizationSimModel, parts[1:]):
        return True
    for place in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(["aimet_quadapter", *parts[:place]]))
        except ModuleNotFoundError:
            continue
        return holds(module, parts[place:])
    return False


def holds(holder: Any, parts: list[str]) -> bool:
    for part in parts:
        fields = getattr(holder, "__dataclass_fields__", {})
        if not hasattr(holder, part) and part not in fields:
            return False
        holder = getattr(holder, part, None)
    return True


@pytest.mark.parametrize("page", names([*PAGES, ROOT / "CHANGELOG.md"]))
def test_names_with_dots_are_there(page: str) -> None:
    spans = re.findall(r"`([a-z_]+(?:\.\w+)+)", read(ROOT / page))
    ours = [s for s in spans if s.split(".")[0] in PACKAGES | {"aimet_quadapter"}]
    wrong = [s for s in ours if not s.endswith((".py", ".md")) and not exists(s)]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)", read(page))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", read(target), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, link


def test_the_readme_names_every_page() -> None:
    text = read(README)
    assert [page.name for page in DOCS if f"docs/{page.name}" not in text] == []


# ------------------------------------------------------------------------------ the figure


def figure() -> Any:
    return drawer("draw_architecture")


def drawer(name: str) -> Any:
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_figure_is_what_the_imports_are_today() -> None:
    drawn = figure().draw()
    assert read(ROOT / "docs" / "architecture.svg") == drawn, "python docs/draw_architecture.py"
    boxes = re.findall(r'<rect class="\w+" x="(-?\d+)" y="\d+" width="(\d+)"', drawn)
    assert all(int(x) >= 0 and int(x) + int(width) <= figure().WIDTH for x, width in boxes)


def test_the_page_of_settings_is_what_the_code_says_today() -> None:
    assert read(ROOT / "docs" / "settings.md") == drawer("write_settings").page()


def test_the_page_of_performance_is_what_the_results_make_of_it() -> None:
    assert read(ROOT / "docs" / "performance.md") == drawer("write_performance").page()


def test_arrows_that_others_imply_are_left_out() -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}, "e": {"a"}}
    fewest = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}, "e": {"a"}}
    assert figure().reduced(graph) == fewest
