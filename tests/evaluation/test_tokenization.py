from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from aimet_quadapter import DataError, check_vocabulary, default_text, prepare, tokens
from aimet_quadapter.evaluation import tokenization as module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(module.__file__).parent / "default_model")


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that treats spaces as one of the known families does."""
    whole = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind.startswith("llama2"):  # a space before the text, no pre-tokenizer
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        whole.normalizer = normalizers.Sequence(steps)
        alphabet = []
        if kind == "llama2, words":  # as the real one: no token goes on after a word
            whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
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
    if kind == "llama2, words":
        whole.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=64)


KINDS = ["gpt2", "prefix", "llama2", "llama2, words", "llama3"]
"""What `trained` makes."""


def at_once(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


PROSE = default_text("heldout")[:6_000]
TEXTS = {
    "prose": PROSE,
    "lines": PROSE.replace(". ", ".\n\n"),
    "spaces": PROSE.replace(" ", "  "),
    "one word": "Llanfair" * 200,
    "code": "def f(x):\n\treturn x ** 2  # naïve α → β 1 2 3\n" * 40,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", KINDS)
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


def with_special_tokens(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a family that puts ids 0 (<s>) and 1 (</s>) where the template says."""
    own = trained.__wrapped__(kind)
    special = [("<s>", 0), ("</s>", 1)]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return own


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ids_of_a_call_are_those_of_the_whole(
    kind: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    tokenizer = with_special_tokens(kind, template)
    for text in ("", "Short", *TEXTS.values()):
        whole = tokenizer(text, verbose=False)["input_ids"]
        for count in (1, 2, 50, 500, len(whole), len(whole) + 9):
            assert module.first_tokens(tokenizer, text, count).tolist() == whole[:count]


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"llama2"}))  # its tokens end with a space
def test_of_a_long_text_only_the_beginning_is_tokenized(kind: str) -> None:
    text = PROSE * 400  # 2.4 MB
    given_: list[int] = []
    own = with_special_tokens(kind, "<s> $A")

    def recorder(part: str, **options: Any) -> Any:
        given_.append(len(part))
        return own(part, **options)

    ids = module.first_tokens(recorder, text, 5_120)
    assert ids.tolist() == own(text[: 4 * module.PIECE], verbose=False)["input_ids"][:5_120]
    assert sum(given_) < 2 * module.PIECE


def test_no_warning_about_the_models_length(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer.deprecation_warnings.clear()
    assert len(tokens(tokenizer, PROSE)) > tokenizer.model_max_length
    assert not caplog.records
    tokenizer(PROSE)
    assert caplog.records  # it would have warned


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


@pytest.mark.parametrize(
    "what", [None, GPT2Tokenizer(), lambda text: text], ids=["None", "empty", "function"]
)
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


def test_rows_come_from_all_over_a_text(tokenizer: Any) -> None:
    text = default_text("calibration")
    whole = tokens(tokenizer, text).tolist()
    rows = module.spread_tokens(tokenizer, text, 5, 64)
    assert rows.shape == (5, 64)
    joined = " ".join(map(str, whole))
    places = [joined.index(" ".join(map(str, row))) / len(joined) for row in rows.tolist()]
    assert places == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.05)


def test_rows_of_a_text_without_spaces_come_from_all_over_it(tokenizer: Any) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    rows = module.spread_tokens(tokenizer, text, 4, 30)
    places = [text.index(tokenizer.decode(row)[1:6]) for row in rows]
    assert [round(4 * place / 20_000) % 4 for place in places] == [0, 1, 2, 3]


def test_rows_of_an_uneven_text_come_from_all_over_it(tokenizer: Any) -> None:
    text = default_text("calibration")[:3000] + " " * 30_000  # three parts of four are spaces
    whole = tokens(tokenizer, text)
    rows = module.spread_tokens(tokenizer, text, 4, 600)
    apart = len(whole) // 4
    for i, row in enumerate(rows):
        assert torch.equal(row, whole[i * apart :][:600])


def test_a_text_with_no_more_tokens_than_needed_gives_all_of_them(tokenizer: Any) -> None:
    text = default_text("calibration")[:2000]
    whole = tokens(tokenizer, text)
    length = len(whole) // 4
    rows = module.spread_tokens(tokenizer, text, 4, length)
    assert torch.equal(rows.flatten(), whole[: 4 * length])
    with pytest.raises(DataError, match=rf"has {len(whole)} tokens; 4 samples of {length + 1}"):
        module.spread_tokens(tokenizer, text, 4, length + 1)
    for nothing in ("", "x" * 100):
        with pytest.raises(DataError, match="Give more text"):
            module.spread_tokens(tokenizer, nothing, 3, 200)
