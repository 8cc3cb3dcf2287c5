"""A text → token ids, of a tokenizer that belongs to the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import DataError

PIECE = 1 << 16  # characters that are tokenized together, about
AROUND = 64  # characters on either side of a cut that must give the same tokens without it
NEAR = 1 << 10  # characters within which a text is cut at a space, else it is cut where it is
CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")  # a space between two letters


def tokens(
    tokenizer: Any, text: str, count: int | None = None, cache_dir: str | Path | None = None
) -> Tensor:
    """The token ids of a text, without special tokens around it: (N,), int64, on the CPU.

    A long text is tokenized in pieces, cut only where that does not change the ids.

    Args:
        tokenizer: a tokenizer of `transformers`.
        text: the text.
        count: only the first so many tokens; all when not given.
        cache_dir: folder that keeps ids (safetensors) by a hash of text, tokenizer and `count`.

    Raises:
        DataError: an empty text, fewer than `count` tokens, or a tokenizer without vocabulary.
    """
    needed = 1 if count is None else count
    if not text.strip() or needed < 1:
        raise DataError(f"{needed} token(s) of {len(text)} characters: nothing to tokenize.")
    vocabulary = _vocabulary(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else vocabulary
    mark = checkpoint.fingerprint([text, type(tokenizer).__name__, state, count], [])
    if cache_dir is not None and (cached := checkpoint.load(Path(cache_dir), mark, mark)):
        return cached[0]
    ids = _encode(tokenizer, text, count)
    if len(ids) < needed:
        raise DataError(
            f"the text has {len(ids)} tokens, {needed} are needed. Ask for fewer, or another text."
        )
    if cache_dir is not None:
        checkpoint.save(Path(cache_dir), mark, mark, ids, {"tokens": len(ids)})
    return ids


def prompt_prefix(tokenizer: Any) -> Tensor:
    """What a tokenizer puts before every prompt, such as BOS: (P,), int64; P is often 0 or 1.

    Windows of a text begin with it where they are to be what deployment computes: the first
    token of a prompt has the largest activations, and a range that never saw it clips it.
    """
    return _special_tokens(tokenizer, "text")[0]


def first_tokens(tokenizer: Any, text: str, count: int, special: bool = True) -> Tensor:
    """The first ids of a text as a call of its tokenizer gives them.

    No more of the text is tokenized than is needed, wherever a cut does not change the ids.

    Args:
        tokenizer: a tokenizer of `transformers`.
        text: the text; it may be empty.
        count: how many ids, at most.
        special: with the special tokens before and behind it.

    Returns:
        Ids (N,), N ≤ `count`, int64, on the CPU.
    """
    if not special:
        return _encode(tokenizer, text, count)
    before, after = _special_tokens(tokenizer, text.lstrip()[:AROUND])
    ids = torch.cat([before, _encode(tokenizer, text, count), after])
    return ids[:count]


def spread_tokens(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """Rows of token ids from all over a text, for one place of it is not what it is made of.

    The text is divided into `count` parts of as many characters, each cut at a space between two
    words where there is one near, and a row is the first `length` ids of a part; no more of a part
    is tokenized than that takes. Where a part has fewer all of the text is, and rows begin at equal
    distances.

    Args:
        tokenizer: a tokenizer of `transformers`.
        text: the text.
        count: how many rows, 1 or more.
        length: ids of a row, 1 or more.

    Returns:
        Ids (count, length), int64, on the CPU; without special tokens.

    Raises:
        DataError: the text has fewer than `count` · `length` tokens.
    """
    places = [len(text) * i // count for i in range(1, count)]
    matches = [CUT.search(text, place, place + NEAR) for place in places]
    begins = [0, *(m.start() if m else p for m, p in zip(matches, places, strict=True))]
    parts = [text[b:e] for b, e in zip(begins, [*begins[1:], len(text)], strict=True)]
    rows = [_encode(tokenizer, part, length) for part in parts]
    if all(len(row) == length for row in rows):
        return torch.stack(rows)
    ids = _encode(tokenizer, text, None)
    if len(ids) < count * length:
        raise DataError(
            f"the text has {len(ids)} tokens; {count} samples of {length} need {count * length}. "
            "Give more text, or fewer or shorter samples."
        )
    apart = len(ids) // count
    return torch.stack([ids[i * apart :][:length] for i in range(count)])


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raise DataError if the tokenizer can give an id that the model has no embedding for.

    The model is a HuggingFace causal LM, a prepared model or a sim. More embeddings than the
    tokenizer has ids are fine: they are often padded.
    """
    vocabulary = _vocabulary(tokenizer)
    module: Any = model if isinstance(model, nn.Module) else getattr(model, "model", model)
    rows = getattr(getattr(module, "config", None), "vocab_size", None)
    if callable(getattr(module, "get_input_embeddings", None)):
        rows = module.get_input_embeddings().weight.shape[0]
    if rows is None:
        raise DataError(f"{type(module).__name__} has no vocabulary. Pass the language model.")
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        raise DataError(
            f"a tokenizer without the model's vocabulary: {token!r} is {vocabulary[token]}, the "
            f"model has embeddings for 0 … {rows - 1}. Load the model's own tokenizer."
        )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    if not callable(tokenizer) or set(vocabulary) <= special:
        raise DataError(
            f"tokenizer {type(tokenizer).__name__} has no vocabulary beyond special tokens. Load "
            "the model's own: AutoTokenizer.from_pretrained(name)."
        )
    return vocabulary


def _special_tokens(tokenizer: Any, text: str) -> tuple[Tensor, Tensor]:
    """What a tokenizer puts before and behind a text."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(text, verbose=False)["input_ids"]
    begins = range(len(whole) - len(bare) + 1)
    begin = next(i for i in begins if whole[i : i + len(bare)] == bare)
    before, after = whole[:begin], whole[begin + len(bare) :]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def _encode(tokenizer: Any, text: str, count: int | None) -> Tensor:
    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    ids: list[int] = []
    begin, place = 0, PIECE
    while (count is None or len(ids) < count) and (match := CUT.search(text, place)):
        cut = match.start()
        place = cut + PIECE
        left, right = text[max(begin, cut - AROUND) : cut], text[cut : cut + AROUND]
        alone, together = encode(left), encode(left + right)
        if alone + encode(right) == together:
            ids += encode(text[begin:cut])
            begin = cut
        elif count is not None and together[: len(alone)] == alone:
            # Only what is right of the cut changes, as where a space is put before every text
            # (Llama 2): enough if no more is needed, else the next try has twice the text.
            first = ids + encode(text[begin:cut])
            if len(first) >= count:
                return torch.tensor(first[:count], dtype=torch.int64)
            place = cut + max(PIECE, cut - begin)
    if count is None or len(ids) < count:
        ids += encode(text[begin:])
    return torch.tensor(ids[:count], dtype=torch.int64)
