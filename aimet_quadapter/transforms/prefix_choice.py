"""Which tokens to keep before every text: by the loss and the ranges on calibration text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from aimet_torch.utils import in_eval_mode
from torch import Tensor, nn

from ..errors import DataError
from ..evaluation import prompt_prefix
from ..models import PreparedDecoder
from ..progress import progress
from ..sim.samples import as_samples
from ..sim.stream import outputs_seen
from .prefix import check_holder, hold

LOUD = 4.0
"""Times the median row's size from which a row of the stream is an outlier."""

PIECE = 64
"""Tokens of the texts that are measured: sinks lie at their beginnings, so there must be many."""

PIECES = 16
"""Pieces that are measured, from all over the text."""

AT_ONCE = 256
"""Tokens in a forward pass, about: of pieces, or of texts of one token."""

WORTH = 0.1
"""Bits that a prefix, or one more token of it, must save to be worth its places."""


@dataclass(frozen=True)
class PrefixCandidate:
    """A prefix that was tried.

    Attributes:
        ids: its tokens; none is text as the application sends it.
        text: what they say.
        loss: mean negative log-likelihood of the calibration text, nats a token.
        spread: log2(largest row / median row), a row's size being its root mean square, mean over
            the sums of the stream: bits of a range that only its largest rows use. The median is
            that of the text's rows, the largest may be a start's.
        outliers: share of the rows, starts included, that are more than `LOUD` times the median in
            some sum.
    """

    ids: tuple[int, ...]
    text: str
    loss: float
    spread: float
    outliers: float


@dataclass(frozen=True)
class PrefixChoice:
    """Result of `choose_prefix`.

    Attributes:
        ids: the tokens that were chosen, now the model's prefix; may be none.
        candidates: all that were tried, the first without a prefix.
    """

    ids: tuple[int, ...]
    candidates: tuple[PrefixCandidate, ...]

    def __str__(self) -> str:
        lines = [f"{'prefix':<32} {'loss':>8} {'spread, bits':>13} {'outliers':>9}"]
        for c in sorted(self.candidates, key=lambda c: c.spread):
            name = f"{repr(c.text)[:20]} {list(c.ids)}" if c.ids else "none"
            mark = "  chosen" if c.ids == self.ids else ""
            lines.append(f"{name:<32} {c.loss:>8.4f} {c.spread:>13.3f} {c.outliers:>9.2%}{mark}")
        return "\n".join(lines)


def choose_prefix(
    model: PreparedDecoder,
    tokenizer: Any,
    calib_loader: Iterable[Any],
    *,
    longest: int = 2,
    tolerance: float = 0.01,
) -> PrefixChoice:
    """Find the tokens behind which a text has the smallest ranges, and make them the prefix.

    Of the text `PIECES` pieces of `PIECE` tokens are read, and each of their tokens begins a text
    of its own: a few may be sinks behind a prefix that quiets all others. Tried are the tokenizer's
    BOS and EOS, the most frequent tokens of the text, and those whose rows of the residual stream
    are outliers; then the best of them with another before or behind it. Of all that leave the
    unquantized loss within `tolerance` of the text's own, the shortest is taken whose `spread` is
    within `WORTH` bits of the smallest, and of these the one with the lowest loss. A text whose
    tokenizer begins it with BOS is compared without it: a prefix begins with it then. An endless
    or empty loader, NaN, another device, half precision: docs/limits.md.

    Args:
        model: what `prepare` returned; its prefix is set.
        tokenizer: the model's, of `transformers`.
        calib_loader: yields token ids, as for `apply_quadapter`.
        longest: most tokens of a prefix besides those that the tokenizer itself puts first.
        tolerance: share by which the loss may rise.

    Returns:
        The choice and every candidate; `print` shows the table.

    Raises:
        UnsupportedModelError: not a prepared model.
        SimError: its weights hold NaN or inf.
        UnfoldedError: it carries an α.
        DataError: the samples hold anything but token ids, or too few.
        On any exception, Ctrl-C included, the model has the prefix that it had.
    """
    check_holder(model)
    search = _search(model, tokenizer, calib_loader)
    with model.without_prefix():
        search.run(longest, tolerance)
    ids = search.chosen(tolerance).ids
    hold(model, torch.tensor(ids, dtype=torch.long))
    return PrefixChoice(ids, tuple(search.tried.values()))


def seconds_to_choose(
    model: PreparedDecoder, tokenizer: Any, calib_loader: Iterable[Any], *, longest: int = 2
) -> float:
    """How long `choose_prefix` will take, about, from measuring no prefix once.

    Args are those of `choose_prefix`; the model is left as it is.
    """
    check_holder(model)
    search = _search(model, tokenizer, calib_loader)
    with model.without_prefix(), torch.no_grad():
        model(search.batches[0][:1])  # the first pass takes longer
        begin = time.perf_counter()
        search._try([()])
        seconds = time.perf_counter() - begin
        singles = len(search._singles(()))
    longer = search.beam**2 * (longest - 1)  # each of the best with itself and with the other
    return seconds * (1 + bool(search.first) + singles + longer)


def _search(model: PreparedDecoder, tokenizer: Any, loader: Iterable[Any]) -> _Search:
    first = prompt_prefix(tokenizer)
    rows = [_without_first(row, first) for row in _rows(model, loader)]
    texts = [piece for row in rows for piece in row.split(PIECE) if len(piece) > 1]
    count = min(PIECES, len(texts))
    texts = [texts[i * len(texts) // count] for i in range(count)]
    return _Search(model, tokenizer, texts, first)


def _rows(model: nn.Module, loader: Iterable[Any]) -> list[Tensor]:
    """Token ids (T,) of each sample."""
    rows: list[Tensor] = []
    for sample in as_samples(loader, model):
        tensors = sample.tensors()
        if len(tensors) != 1 or tensors[0].is_floating_point():
            raise DataError(
                "a prefix is chosen on token ids (B, T) alone: give samples without other inputs."
            )
        rows.extend(tensors[0].long())
    return rows


def _without_first(ids: Tensor, first: Tensor) -> Tensor:
    first = first.to(ids.device)
    rest = ids[len(first) :] if torch.equal(ids[: len(first)], first) else ids
    if len(rest) < 2:
        raise DataError(
            f"a sample of {len(ids)} tokens: 2 are needed besides {first.tolist()}, which the "
            "tokenizer puts first. Give longer samples."
        )
    return rest


def _of_equal_length(texts: Sequence[Tensor]) -> list[Tensor]:
    """Texts of as many tokens stacked, about `AT_ONCE` tokens at a time; (B, T) each."""
    by_length: dict[int, list[Tensor]] = {}
    for text in texts:
        by_length.setdefault(len(text), []).append(text)
    return [
        batch
        for length, alike in by_length.items()
        for batch in torch.stack(alike).split(max(AT_ONCE // length, 1))
    ]


def _behind(ids: tuple[int, ...], rows: Tensor) -> Tensor:
    """The same tokens before each row; (B, P + T)."""
    return torch.cat((rows.new_tensor(ids).expand(len(rows), len(ids)), rows), 1)


class _Search:
    """Candidates, each measured once, the best of them made longer."""

    beam = 2
    frequent = 8

    def __init__(
        self, model: PreparedDecoder, tokenizer: Any, texts: Sequence[Tensor], first: Tensor
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.batches = _of_equal_length(texts)
        self.starts = torch.cat(list(texts)).unique()[:, None]
        self.first = tuple(first.tolist())
        self.tried: dict[tuple[int, ...], PrefixCandidate] = {}
        self.loud: dict[tuple[int, ...], list[int]] = {}

    def run(self, longest: int, tolerance: float) -> None:
        """Try no prefix, then single tokens, then longer ones while they save bits."""
        self._try([()])
        self._try([self.first] if self.first else [])
        best = self.chosen(tolerance)
        singles = self._singles(best.ids)
        beams = [self.first]
        for length in range(longest):
            wanted = [(*ids, t) for ids in beams for t in singles]
            if length:
                own = [ids[len(self.first) :] for ids in beams]
                wanted += [(*self.first, t, *ids) for ids in own for t in singles]
            if not wanted:
                return
            self._try([ids for ids in dict.fromkeys(wanted) if ids not in self.tried])
            new = self.chosen(tolerance)
            if length and new.spread > best.spread - WORTH:
                return
            best = new
            ranked = sorted((self.tried[i] for i in wanted), key=lambda c: c.outliers)
            beams = [c.ids for c in ranked[: self.beam]]
            singles = list(dict.fromkeys([*self.loud[beams[0]], *(ids[-1] for ids in beams)]))

    def chosen(self, tolerance: float) -> PrefixCandidate:
        """The best so far."""
        none = self.tried[()]
        most = none.loss * (1 + tolerance)
        allowed = [none, *(c for c in self.tried.values() if c.loss <= most)]
        best = min(allowed, key=lambda c: c.spread)
        shorter = [c for c in allowed if c.spread < best.spread + WORTH]
        return min(shorter, key=lambda c: (len(c.ids), c.loss))

    def _singles(self, ids: tuple[int, ...]) -> list[int]:
        counts = Counter(torch.cat(list(self.texts)).tolist())
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        frequent = [token for token, _ in counts.most_common(self.frequent)]
        found = [*(t for t in special if t is not None), *frequent, *self.loud[ids]]
        return list(dict.fromkeys(t for t in found if t not in self.first))

    def _try(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        for _, ids in zip(progress(len(prefixes), "trying prefixes"), prefixes, strict=True):
            self.tried[ids], self.loud[ids] = self._measure(ids)

    @torch.no_grad()
    def _measure(self, ids: tuple[int, ...]) -> tuple[PrefixCandidate, list[int]]:
        """A candidate, and the tokens whose rows are outliers, the most frequent first."""
        hold(self.model, torch.tensor(ids, dtype=torch.long))
        sent = () if ids else self.first  # what an application sends before the text
        texts = [_behind(sent, rows) for rows in self.batches]
        starts = _behind(sent, self.starts).split(AT_ONCE)
        sizes: dict[str, list[Tensor]] = {}

        def note(name: str, x: Tensor) -> None:
            """The root mean square of each row of a sum of the stream."""
            sizes.setdefault(name, []).append(x.float().square().mean(-1).sqrt().flatten())

        total, count = 0.0, 0
        sums = outputs_seen(self.model, self.model.residual_sums, note)
        with in_eval_mode(self.model), sums:
            for text in texts:
                logits = self.model(text)[:, len(sent) : -1].float().flatten(0, 1)
                wanted = text[:, len(sent) + 1 :].flatten()
                total += F.cross_entropy(logits, wanted, reduction="sum").item()
                count += len(wanted)
            for start in starts:
                self.model(start)
        seen = torch.cat([x.flatten() for x in (*texts, *starts)])
        spreads, loud = [], torch.zeros_like(seen, dtype=torch.bool)
        for parts in sizes.values():
            rows = torch.cat(parts)
            median = torch.cat(parts[: len(texts)]).median()  # most starts may be sinks
            spreads.append(float((rows.max() / median).log2()))
            loud |= rows > LOUD * median
        found = PrefixCandidate(
            ids=ids,
            text=self.tokenizer.decode(list(ids)),
            loss=total / count,
            spread=sum(spreads) / len(spreads),
            outliers=float(loud.float().mean()),
        )
        return found, [token for token, _ in Counter(seen[loud].tolist()).most_common(3)]
