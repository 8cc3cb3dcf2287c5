import io
import json
import random
import tokenize
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from aimet_quadapter import (
    DataError,
    calibration_samples,
    check_disjoint,
    check_text,
    check_vocabulary,
    default_text,
    load_text,
    prepare,
    tokens,
)
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


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(module.__file__).parent / "default_model")


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that treats spaces as one of the known families does."""
    whole = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "llama2":  # a space before the text, no pre-tokenizer
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        whole.normalizer = normalizers.Sequence(steps)
        alphabet = []
    elif kind == "llama3":  # newlines belong to the punctuation before them
        pattern = Regex(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        )
        whole.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, False)]
        )
    else:
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    whole.train_from_iterator([default_text("calibration")[:30_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=64)


def at_once(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
    with pytest.raises(DataError, match=r"PTB could not be loaded.*KeyError.*body"):
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


PROSE = default_text("heldout")[:6_000]
TEXTS = {
    "prose": PROSE,
    "lines": PROSE.replace(". ", ".\n\n"),
    "spaces": PROSE.replace(" ", "  "),
    "one word": "Llanfair" * 200,
    "code": "def f(x):\n\treturn x ** 2  # naïve α → β 1 2 3\n" * 40,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "prefix", "llama2", "llama3"])
def test_pieces_give_the_ids_of_the_whole(
    kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    ids = tokens(trained(kind), text)
    assert ids.dtype == torch.int64
    assert ids.tolist() == at_once(trained(kind), text)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab 1.,\n\t'sα"), min_size=1, max_size=120),
    count=st.none() | st.integers(1, 99),
)
def test_any_text_may_be_cut(text: str, count: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 5)
        ids = module._encode(trained("gpt2"), text, count)
    assert ids.tolist() == at_once(trained("gpt2"), text)[:count]


def test_a_long_text_is_cut_and_only_its_beginning_is_tokenized(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 500)
    longest: list[int] = []

    class Recorder:
        get_vocab = tokenizer.get_vocab
        all_special_tokens = tokenizer.all_special_tokens

        def __call__(self, text: str, **options: Any) -> Any:
            longest.append(len(text))
            return tokenizer(text, **options)

    whole = at_once(tokenizer, PROSE)
    assert tokens(Recorder(), PROSE).tolist() == whole
    assert 450 < max(longest) < 600
    before = len(longest)
    assert tokens(Recorder(), PROSE, 20).tolist() == whole[:20]
    assert len(longest) - before == 4  # the two sides of one cut, both together, one piece


def test_no_warning_about_the_models_length(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer.deprecation_warnings.clear()
    assert len(tokens(tokenizer, PROSE)) > tokenizer.model_max_length
    assert not caplog.records
    tokenizer(PROSE)
    assert "longer than the specified maximum" in caplog.text


def test_the_first_tokens(tokenizer: Any) -> None:
    whole = tokens(tokenizer, PROSE)
    assert torch.equal(tokens(tokenizer, PROSE, 100), whole[:100])
    assert torch.equal(tokens(tokenizer, PROSE, len(whole)), whole)
    with pytest.raises(DataError, match=f"has {len(whole)} tokens, {len(whole) + 1} are needed"):
        tokens(tokenizer, PROSE, len(whole) + 1)
    for text, count in (("", None), (" \n", None), (PROSE, 0), (PROSE, -1)):
        with pytest.raises(DataError, match="nothing to tokenize"):
            tokens(tokenizer, text, count)


def test_cached_ids_are_used_for_the_same_text_tokenizer_and_count(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = module._encode
    monkeypatch.setattr(module, "_encode", lambda *args: calls.append(1) or encode(*args))
    first = tokens(tokenizer, PROSE, cache_dir=tmp_path / "new" / "folder")
    assert torch.equal(tokens(tokenizer, PROSE, cache_dir=tmp_path / "new" / "folder"), first)
    assert len(calls) == 1
    other = trained("gpt2")
    different = (
        (tokenizer, PROSE + ".", None),
        (tokenizer, PROSE, 50),
        (other, PROSE, None),
    )
    for case in different:
        expected = tokens(*case)
        assert torch.equal(tokens(*case, cache_dir=tmp_path / "new" / "folder"), expected)
    assert len(calls) == 1 + 2 * len(different)
    files = list((tmp_path / "new" / "folder").iterdir())
    assert {file.suffix for file in files} == {".safetensors"}
    assert len(files) == 1 + len(different)


def test_a_token_added_to_a_tokenizer_is_another_tokenizer(tmp_path: Path) -> None:
    own = trained.__wrapped__("gpt2")
    before = tokens(own, PROSE, cache_dir=tmp_path)
    own.add_tokens(["the"])
    assert not torch.equal(tokens(own, PROSE, cache_dir=tmp_path), before)


def test_a_broken_cache_file_is_replaced(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(tokenizer, PROSE, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    assert torch.equal(tokens(tokenizer, PROSE, cache_dir=tmp_path), ids)
    assert [f.stat().st_size for f in tmp_path.iterdir()] == [size]
    monkeypatch.setattr(module, "_encode", None)
    assert torch.equal(tokens(tokenizer, PROSE, cache_dir=tmp_path), ids)


@pytest.mark.parametrize("what", [None, GPT2Tokenizer(), lambda text: text], ids=str)
def test_a_tokenizer_without_a_vocabulary(what: Any) -> None:
    with pytest.raises(DataError, match="no vocabulary beyond special tokens"):
        tokens(what, PROSE)
    with pytest.raises(DataError, match="no vocabulary beyond special tokens"):
        check_vocabulary(what, tiny.gpt2(1))


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama], ids=["gpt2", "llama"])
def test_a_tokenizer_must_fit_the_models_embeddings(make: Any) -> None:
    vocabulary = {f"w{i}": i for i in range(tiny.VOCAB)}
    fits = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )
    model = make(1)
    for form in (model, prepare(model), tiny.decoder_sim(model)):
        check_vocabulary(fits, form)
    fits.add_tokens(["extra"])
    for form in (model, prepare(model), tiny.decoder_sim(model)):
        with pytest.raises(DataError, match=f"'extra' is {tiny.VOCAB}, .* 0 … {tiny.VOCAB - 1}"):
            check_vocabulary(fits, form)
    model.resize_token_embeddings(tiny.VOCAB + 32)  # padded: more rows than ids
    check_vocabulary(fits, model)
    with pytest.raises(DataError, match="Pass the language model"):
        check_vocabulary(fits, torch.nn.Linear(2, 2))


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 6),
    length=st.integers(1, 9),
    spare=st.integers(0, 20),
    seed=st.integers(),
)
def test_samples_are_windows_that_do_not_overlap(
    samples: int, length: int, spare: int, seed: int
) -> None:
    ids = torch.arange(samples * length + spare)  # an id is its place
    drawn = calibration_samples(ids[None], samples, length, seed)
    assert [window.shape for window in drawn] == [(1, length)] * samples
    for window in drawn:
        start = int(window[0, 0])
        assert torch.equal(window[0], ids[start : start + length])
    joined = torch.cat(drawn, 1)[0]
    assert torch.equal(joined, joined.unique())  # in order, no token twice
    assert all(map(torch.equal, drawn, calibration_samples(ids, samples, length, seed)))


def test_every_choice_of_windows_is_equally_likely() -> None:
    ids = torch.arange(6)  # two windows of 2: 6 ways to place them
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(3_000):
        starts = tuple(int(w[0, 0]) for w in calibration_samples(ids, 2, 2, seed))
        seen[starts] = seen.get(starts, 0) + 1
    assert set(seen) == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    assert all(400 < times < 600 for times in seen.values())


def test_too_few_tokens_for_the_samples() -> None:
    for samples, length in ((3, 4), (0, 4), (2, 0), (-1, -4)):
        with pytest.raises(DataError, match="from 11 tokens without overlap"):
            calibration_samples(torch.arange(11), samples, length, 0)


def test_a_sample_must_not_occur_in_the_evaluation_text() -> None:
    generator = random.Random(0)
    text = torch.tensor([generator.randrange(5) for _ in range(400)])
    (window,) = calibration_samples(text, 1, 40, seed=3)
    apart = torch.tensor([generator.randrange(5) for _ in range(400)])
    calibration_samples(text, 1, 40, seed=3, exclude=apart)
    for exclude in (text, text[None], window, torch.cat([apart[:7], window[0], apart])):
        with pytest.raises(DataError, match="occurs in the evaluation text"):
            calibration_samples(text, 1, 40, seed=3, exclude=exclude)
    almost = torch.cat([apart[:7], window[0, :-1], window[0, -1:] + 1, apart])
    calibration_samples(text, 1, 40, seed=3, exclude=almost)


def test_only_whole_ids_count_as_an_occurrence() -> None:
    # The bytes of 1 stand inside those of 256, but the id does not occur.
    assert not module._occurs(torch.tensor([[1]]), torch.tensor([256, 256, 0]))
    assert module._occurs(torch.tensor([[1]]), torch.tensor([256, 256, 1]))
