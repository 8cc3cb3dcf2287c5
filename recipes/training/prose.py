"""English technical prose from the standard library, read as text and never executed."""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Folders of the standard library whose text is not prose (tables, generated code) or is absent
# from many installations (the test suites).
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
SHORTEST_PIECE = 40  # characters of a docstring or comment
SHORTEST_PART = 200  # characters of a module or topic
# A part is a module or a help topic; its place in a split depends on its name only, so that the
# split does not shift when another Python version adds a module.
SPLIT_BUCKETS = 20
VALID_BUCKETS = frozenset({3})
TEST_BUCKETS = frozenset({11})


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, path) of the library's sources in the order of their names."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and "-" not in "".join(parts):
            yield ".".join(parts), path


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the docstrings in a source."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders) and (text := ast.get_docstring(node, clean=True)):
            yield node.body[0].lineno, text


def comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of comments that fill their lines, neighbouring lines joined."""
    block: list[str] = []
    first = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string.strip():
            continue
        if token.start[0] != last + 1 and block:
            yield first, "\n".join(block)
            block = []
        first = first if block else token.start[0]
        last = token.start[0]
        block.append(token.string.lstrip("#!").removeprefix(" ").rstrip())
    if block:
        yield first, "\n".join(block)


def is_prose(text: str) -> bool:
    """Tell sentences from rulers, markers and tables: long enough and mostly letters."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= SHORTEST_PIECE and letters >= 0.75 * len(text)


def module_text(path: Path) -> str:
    """The prose of one source file in the order of its lines; empty if it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        pieces = [*docstrings(source), *comment_blocks(source)]
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return ""
    return "\n\n".join(text.strip() for _, text in sorted(pieces) if is_prose(text))


def topic_texts(root: Path) -> dict[str, str]:
    """The help topics, read as a literal from the source of ``pydoc_data.topics``."""
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    raise ValueError("pydoc_data/topics.py holds no dictionary of topics")


def split_of(name: str) -> str:
    """``train``, ``valid`` or ``test``, from the name alone."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % SPLIT_BUCKETS
    if bucket in VALID_BUCKETS:
        return "valid"
    return "test" if bucket in TEST_BUCKETS else "train"


def collect_text(root: Path | None = None) -> dict[str, list[str]]:
    """All prose of the standard library, one string a module or topic, by split."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts = {f"topic {name}": text for name, text in sorted(topic_texts(root).items())}
    parts |= {name: module_text(path) for name, path in module_files(root)}
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for name, text in parts.items():
        if len(text) >= SHORTEST_PART and text not in seen:
            splits[split_of(name)].append(text)
            seen.add(text)
    return splits


def excerpt(texts: list[str], size: int, longest: int = 12_000) -> str:
    """About ``size`` bytes of whole paragraphs, from as many of the texts as are needed."""
    shortened = []
    for text in texts:
        head = text[:longest]
        shortened.append(head if len(head) == len(text) else head.rpartition("\n\n")[0])
    joined = "\n\n".join(part.strip() for part in shortened if part).encode()[:size]
    return joined.decode(errors="ignore").rpartition("\n\n")[0] + "\n"
