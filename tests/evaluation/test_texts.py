import io
import json
import tokenize
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aimet_quadapter import DataError, check_disjoint, check_text, default_text, load_text
from aimet_quadapter.evaluation import texts as module

NAMES = ("WikiText-2", "PTB", "LAMBADA", "CBT-CN", "CBT-NE")
SPLITS = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


def cbt(place: str, answer: str) -> list[dict[str, Any]]:
    return [
        {
            "sentences": [f"Sentence {place} {i} ." for i in range(20)],
            "question": f"`` There is the XXXXX , '' said {place} .",
            "answer": answer,
            "options": [answer, "boat"],
        },
        {
            "sentences": ["So it went on ."] * 20,
            "question": "XXXXX !",
            "answer": "Come",
            "options": ["Come"],
        },
    ]


def rows(source: str, split: str) -> list[dict[str, Any]]:
    """What a split holds, with the columns of the dataset on the hub."""
    return {
        "WikiText-2": [{"text": ""}, {"text": f" = {split} = \n"}, {"text": " The film . \n"}],
        "PTB": [{"sentence": f"no it was n't {split}"}, {"sentence": "but <unk> rose N points"}],
        "LAMBADA": [
            {"text": f"a {split} passage .", "domain": None},
            {"text": "another", "domain": None},
        ],
        "CBT-CN": cbt(split, "house"),
        "CBT-NE": cbt(split, "Alice"),
    }[source]


def card(folder: Path, configs: dict[str, str]) -> None:
    """A repository's README.md, which says where each config's files are."""
    lines = ["---", "configs:"]
    for config, where in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in SPLITS:
            lines += [f"  - split: {split}", f"    path: {where.format(split=split)}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def repository(folder: Path, source: module.Source) -> None:
    """A local folder with the files of a dataset's repository on the hub, as it lays them out."""
    from datasets import Dataset

    for split in SPLITS:
        content = rows(source.name, split)
        if source.name == "PTB":  # the branch refs/convert/parquet
            file = folder / "penn_treebank" / split / "0000.parquet"
        elif source.name == "LAMBADA":  # the other file format
            file = folder / f"{split}.jsonl"
        else:
            file = folder / str(source.config) / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
        else:
            Dataset.from_list(content).to_parquet(file)
    if source.name == "LAMBADA":
        card(folder, {"plain_text": "{split}.jsonl"})
    elif source.config:
        configs = ("CN", "NE") if source.name.startswith("CBT") else (source.config, "other")
        card(folder, {c: f"{c}/{{split}}-*.parquet" for c in configs})


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    for source in module.SOURCES:
        repository(root / source.hub, source)
    return {s.name: root / s.hub for s in module.SOURCES}


@pytest.fixture
def hub(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """The datasets of the hub, as local repositories that the real `datasets` loads."""
    local = tuple(replace(s, hub=str(repositories[s.name])) for s in module.SOURCES)
    monkeypatch.setattr(module, "SOURCES", local)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return repositories


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for folder in ("wikitext2", "ptb", "lambada", "cbt-cn", "cbt-ne", "novels"):
        (root / folder).mkdir(parents=True)
        for file in SPLITS.values():
            (root / folder / file).write_text(f" {folder} {file} \n\n é\n", encoding="utf-8")
    return root


EXPECTED = {
    "WikiText-2": "\n\n = {split} = \n\n\n The film . \n",
    "PTB": "no it was n't {split} but <unk> rose N points",
    "LAMBADA": "a {split} passage .\n\nanother",
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", EXPECTED)
def test_rows_of_the_hub_become_one_text(name: str, split: str, hub: object) -> None:
    assert load_text(name, split) == EXPECTED[name].format(split=split)


@pytest.mark.parametrize(("name", "word"), [("CBT-CN", "house"), ("CBT-NE", "Alice")])
def test_a_row_of_cbt_is_its_sentences_and_the_answered_question(
    name: str, word: str, hub: object
) -> None:
    first, second = load_text(name, "test").split("\n\n")
    sentences = " ".join(f"Sentence test {i} ." for i in range(20))
    assert first == f"{sentences} `` There is the {word} , '' said test ."
    assert second == " ".join(["So it went on ."] * 20) + " Come !"


def test_a_spelling_of_the_paper_finds_the_dataset(hub: object) -> None:
    for spelled in ("Wikitext2", "wikitext2", "wikitext-2"):
        assert load_text(spelled) == load_text("WikiText-2")
    assert load_text("cbt_ne") == load_text("CBT-NE") != load_text("CBT-CN")


def test_the_registry_names_the_five_texts() -> None:
    assert tuple(s.name for s in module.SOURCES) == NAMES
    folders = [s.folder for s in module.SOURCES]
    assert folders == ["wikitext2", "ptb", "lambada", "cbt-cn", "cbt-ne"]
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for source in module.SOURCES:
        for fact in (source.name, source.folder, source.hub, source.config, source.revision):
            assert fact is None or f"`{fact}`" in page or f"| {fact} |" in page


@pytest.mark.parametrize("split", SPLITS)
def test_local_files_are_read_as_they_are(split: str, text_dir: Path) -> None:
    for name, folder in zip((*NAMES, "novels"), (*FOLDERS, "novels"), strict=True):
        check_text(name, split, text_dir)
        expected = f" {folder} {SPLITS[split]} \n\n é\n"
        assert load_text(name, split, text_dir) == expected
        assert load_text(folder, split, str(text_dir)) == expected


FOLDERS = ("wikitext2", "ptb", "lambada", "cbt-cn", "cbt-ne")


def test_built_in_texts(text_dir: Path) -> None:
    assert load_text("built-in") == default_text("heldout")
    assert load_text("built-in", "train") == default_text("calibration")
    code = {split: load_text("Built-in code", split) for split in ("train", "test")}
    assert "class shlex" in code["test"]
    assert "class shlex" not in code["train"]
    found = tokenize.generate_tokens(io.StringIO(code["test"]).readline)
    assert tokenize.COMMENT not in {token.type for token in found}
    assert "A lexical analyzer class" not in code["test"]  # a docstring of shlex
    assert load_text("Built_in", "validation", text_dir) == default_text("calibration")


def test_names_splits_and_files_are_checked_first(text_dir: Path) -> None:
    with pytest.raises(DataError, match=r"'C4'; there are WikiText-2, PTB, .* and built-in"):
        check_text("C4")
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test"):
        check_text("PTB", "dev")
    with pytest.raises(DataError, match=r"holds .*novels/test\.txt"):
        check_text("C4", "test", text_dir)
    with pytest.raises(DataError, match=r"missing.* holds no text"):
        check_text("PTB", "test", text_dir / "nowhere")
    (text_dir / "ptb" / "train.txt").unlink()
    (text_dir / "ptb" / "valid.txt").write_text("")
    with pytest.raises(DataError, match=r"train.txt is missing.*ptb/test.txt.*Put the train split"):
        check_text("PTB", "train", text_dir)
    with pytest.raises(DataError, match=r"valid\.txt is empty"):
        check_text("PTB", "validation", text_dir)
    check_text("PTB", "test", text_dir)
    for name in (*NAMES, "built-in"):
        check_text(name)


def test_a_file_without_a_text_is_refused(text_dir: Path) -> None:
    (text_dir / "ptb" / "test.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="PTB, split test, is empty"):
        load_text("PTB", "test", text_dir)
    (text_dir / "ptb" / "test.txt").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match="not UTF-8"):
        load_text("PTB", "test", text_dir)


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # noqa: F401  # reads the constant below once, when first imported

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cimec/lambada.*DIR/lambada/valid\.txt.*--text-dir"):
        load_text("LAMBADA", "validation")


def test_a_changed_dataset_is_named(hub: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [replace(s, columns=("body",)) for s in module.SOURCES]
    monkeypatch.setattr(module, "SOURCES", tuple(changed))
    with pytest.raises(DataError, match=r"PTB could not be loaded.*body"):
        load_text("PTB")


def test_calibration_and_evaluation_must_differ() -> None:
    for one, other in (
        (("PTB", "test"), ("ptb", "test")),
        (("novels", "train"), ("novels", "train")),
        (("CBT-CN", "test"), ("cbt_ne", "test")),  # the same books
        (("built-in", "train"), ("builtin", "validation")),
    ):
        with pytest.raises(DataError, match="use the same text"):
            check_disjoint(one, other)
    for one, other in (
        (("PTB", "validation"), ("PTB", "test")),
        (("PTB", "test"), ("WikiText-2", "test")),
        (("CBT-CN", "train"), ("CBT-NE", "test")),
        (("built-in", "validation"), ("built-in", "test")),
        (("novels", "test"), ("children", "test")),
    ):
        check_disjoint(one, other)
