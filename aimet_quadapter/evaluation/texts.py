"""A text's name → the text (`docs/data.md`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from .embedded import default_code, default_text

Part = Literal["calibration", "heldout"]
BUILT_IN: dict[str, Callable[[Part], str]] = {
    "built-in": default_text,
    "built-in code": default_code,
}
# Split → the built-in text that stands for it; → its file in a folder of local texts.
PARTS: dict[str, Part] = {"train": "calibration", "validation": "calibration", "test": "heldout"}
FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


@dataclass(frozen=True)
class Source:
    """A dataset of the hub (train, validation, test) and how its rows become one text.

    A row is the strings of its `columns`, lists of strings included, with a space between them;
    with `answer`, XXXXX in it is replaced by that column. Rows are joined with `join`. `name` is
    the paper's, `folder` that of the local text.
    """

    name: str
    folder: str
    hub: str
    config: str | None
    columns: tuple[str, ...] = ("text",)
    join: str = "\n\n"
    revision: str | None = None
    answer: str | None = None

    def text(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """All rows as one text."""
        return self.join.join(map(self._row, rows))

    def _row(self, row: Mapping[str, Any]) -> str:
        cells = [row[column] for column in self.columns]
        text = " ".join(cell if isinstance(cell, str) else " ".join(cell) for cell in cells)
        return text if self.answer is None else text.replace("XXXXX", row[self.answer])


CBT = ("sentences", "question")
PARQUET = "refs/convert/parquet"  # the branch with the hub's own conversion of a dataset
SOURCES = (  # the five texts of the paper's Table 1, in its order
    # As transformers' "Perplexity of fixed-length models" loads and joins it.
    Source("WikiText-2", "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
    # A row is a sentence of running text; the main branch is a script, not run since datasets 4.0.
    Source("PTB", "ptb", "ptb-text-only/ptb_text_only", None, ("sentence",), " ", PARQUET),
    # A row is a passage of its own (in train: a novel).
    Source("LAMBADA", "lambada", "cimec/lambada", "plain_text"),
    # A row is 20 sentences, a question made from the 21st, and the word taken out of it.
    Source("CBT-CN", "cbt-cn", "cam-cst/cbt", "CN", CBT, answer="answer"),
    Source("CBT-NE", "cbt-ne", "cam-cst/cbt", "NE", CBT, answer="answer"),
)


def load_text(name: str, split: str = "test", text_dir: str | Path | None = None) -> str:
    """The text of one split of a dataset.

    Args:
        name: "WikiText-2", "PTB", "LAMBADA", "CBT-CN" or "CBT-NE" (case, "-" and "_" do not
            matter), "built-in" or "built-in code" for what comes with the package and with
            Python, or a folder of `text_dir`.
        split: "train", "validation" or "test".
        text_dir: read `text_dir/<folder>/{train,valid,test}.txt` as it is instead of asking the
            hub; folders are wikitext2, ptb, lambada, cbt-cn, cbt-ne or any other name.

    Raises:
        DataError: no such name, split or file, the hub cannot be reached, or the text is empty.
    """
    found = _find(name, split, text_dir)
    if isinstance(found, Source):
        text = _from_hub(found, split)
    else:
        text = read_file(found) if isinstance(found, Path) else found(PARTS[split])
    if not text.strip():
        raise DataError(f"the text {name}, split {split}, is empty. Check where it comes from.")
    return text


def read_file(file: Path) -> str:
    """The text in a file; DataError unless it is UTF-8, OSError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file} is not UTF-8 ({e.reason} at byte {e.start}). "
            "Convert it, e.g. iconv -f LATIN1 -t UTF-8."
        ) from e


def check_text(name: str, split: str = "test", text_dir: str | Path | None = None) -> None:
    """Raise what `load_text` would raise, as far as it shows without reading or downloading."""
    _find(name, split, text_dir)


def text_name(name: str) -> str:
    """The name that the tables have, whatever its spelling: "wikitext2" → "WikiText-2"."""
    source = _source(name)
    return source.name if source else _built_in(name) or name


def check_disjoint(calibration: tuple[str, str], evaluation: tuple[str, str]) -> None:
    """Raise DataError if two (name, split) are the same text, under whatever spelling.

    The same split of CBT-CN and of CBT-NE counts as one text, for both are taken from the same
    books; so do train and validation of "built-in".
    """
    if _identity(*calibration) == _identity(*evaluation):
        raise DataError(
            f"calibration on {' / '.join(calibration)} and evaluation on {' / '.join(evaluation)} "
            "use the same text. Calibrate on another split, e.g. validation, or another text."
        )


def _find(
    name: str, split: str, text_dir: str | Path | None
) -> Source | Path | Callable[[Part], str]:
    """What a text comes from: a dataset of the hub, a file, or what reads a built-in part."""
    if split not in FILES:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(FILES)}.")
    source = _source(name)
    if (built_in := _built_in(name)) is not None:
        return BUILT_IN[built_in]
    if text_dir is None and source is not None:
        return source
    if text_dir is None:
        raise DataError(
            f"no dataset is called {name!r}; there are {', '.join(s.name for s in SOURCES)} and "
            f"{' and '.join(BUILT_IN)}. For a text of your own give text_dir (--text-dir)."
        )
    file = Path(text_dir) / (source.folder if source else name) / FILES[split]
    if not file.is_file() or not file.stat().st_size:
        there = sorted(f"{p.parent.name}/{p.name}" for p in Path(text_dir).glob("*/*.txt"))
        raise DataError(
            f"{file} is {'empty' if file.is_file() else 'missing'}; {text_dir} holds "
            f"{', '.join(there) or 'no text'}. Put the {split} split of {name} there."
        )
    return file


def _key(name: str) -> str:
    return re.sub("[-_ ]", "", name).casefold()


def _built_in(name: str) -> str | None:
    return next((b for b in BUILT_IN if _key(b) == _key(name)), None)


def _source(name: str) -> Source | None:
    return next((s for s in SOURCES if _key(s.name) == _key(name)), None)


def _identity(name: str, split: str) -> tuple[str, str]:
    if (built_in := _built_in(name)) is not None:
        return built_in, PARTS.get(split, split)
    source = _source(name)
    return (source.hub if source else name), split


def _from_hub(source: Source, split: str) -> str:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.hub, source.config, split=split, revision=source.revision)
        return source.text(rows)
    except Exception as e:
        raise DataError(
            f"{source.name} could not be loaded from the hub ({source.hub}): {type(e).__name__}: "
            f"{e}. Check the network, or put the text into DIR/{source.folder}/{FILES[split]} and "
            "give that folder as text_dir (--text-dir DIR)."
        ) from e
