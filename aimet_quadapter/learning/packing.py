"""What was found of blocks and layers, as a tensor and plain data: for disk, for other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pairs.pair import Pair
from .learner import PairResult
from .ranks import Ranks


def packed(results: Sequence[PairResult]) -> tuple[Tensor, dict[str, Any]]:
    """Every candidate of pairs that learned together, (candidates, channels), and the rest.

    Args:
        results: of a block or a layer: α and `crossed` alone differ.
    """
    first = results[0]
    record = {k: getattr(first, k) for k in ("kept", "losses", "curve", "seconds")}
    record |= {"crossed": [r.crossed for r in results], "candidates": list(first.candidates)}
    rows = [torch.cat([r.candidates[name] for r in results]) for name in first.candidates]
    return torch.stack(rows), record


def unpacked(pairs: Sequence[Pair], rows: Tensor, record: dict[str, Any]) -> list[PairResult]:
    """The results that `packed` was given, to the bit.

    Args:
        pairs: theirs.
        rows: what `packed` gave, on the device where α is wanted.
        record: the same, once it was JSON.
    """
    record = record | {"curve": [(int(s), float(v)) for s, v in record["curve"]]}
    names, crossed = record.pop("candidates"), record.pop("crossed")
    parts = rows.split([pair.channels for pair in pairs], dim=1)
    return [
        PairResult(pair=p, candidates=dict(zip(names, of, strict=True)), crossed=c, **record)
        for p, of, c in zip(pairs, parts, crossed, strict=True)
    ]


def of_all_ranks(
    ranks: Ranks, own: Sequence[PairResult], pairs: Sequence[Pair], device: torch.device
) -> list[PairResult]:
    """The results of all ranks.

    Args:
        ranks: those that share the pairs.
        own: what this one found.
        pairs: all of them, in the order of what is returned.
        device: where α is wanted.
    """
    if ranks.size == 1:
        by_pair = {r.pair.name: r for r in own}
        return [by_pair[pair.name] for pair in pairs]
    parts = {r.pair.name: packed([r]) for r in own}
    rows: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for received in ranks.told_tensors({name: x for name, (x, _) in parts.items()}):
        rows |= received
    for told in ranks.told({name: record for name, (_, record) in parts.items()}):
        records |= told
    both = [(p, rows[p.name].to(device), records[p.name]) for p in pairs]
    return [result for pair, of, record in both for result in unpacked((pair,), of, record)]
