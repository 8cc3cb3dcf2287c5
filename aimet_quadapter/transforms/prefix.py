"""Tokens whose keys and values are constants of the model, before every text.

The massive activations of a decoder lie in its first token, or in the first that can be a sink of
attention (Sun et al., 2024). Behind a prefix no token of a text has them (PrefixQuant, Chen et al.,
2024; CushionCache, Son et al., 2024), and no range must hold them: the constants are keys and
values, which are ordinary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from aimet_torch.utils import in_eval_mode, remove_all_quantizers
from torch import Tensor

from ..errors import DataError, UnfoldedError, UnsupportedModelError
from ..models import PreparedDecoder
from ..models.attention import Recorded
from ..models.widening import module_by_module_in_float32
from ..pairs.attachment import carries_alpha
from ..sim.values import check_ids, check_weights


def set_prefix(model: PreparedDecoder, ids: Tensor | Sequence[int]) -> None:
    """Keep the keys and values of a few tokens as constants: every text is read behind them.

    Text then begins at position P, their number; logits of a text are those that it has behind
    these tokens, so the application must not send them again. The graph gains a concatenation at
    the keys and values of each layer; the constants have the encoding of what they stand beside.
    What becomes of NaN, another device, half precision: docs/limits.md.

    Args:
        model: what `prepare` returned. Of a sim (`sim.model`) find pairs and set ranges anew
            afterwards.
        ids: token ids (P,), such as `prompt_prefix(tokenizer)`; none takes a prefix out again.

    Raises:
        UnsupportedModelError: not a prepared model.
        SimError: its weights hold NaN or inf.
        UnfoldedError: it carries an α.
        DataError: `ids` are no token ids of the model, or leave no position for a text.
    """
    check_holder(model)
    hold(model, _checked(model, ids))


def check_holder(model: Any) -> None:
    """Raise UnsupportedModelError, UnfoldedError or SimError unless a model can hold a prefix."""
    if not isinstance(model, PreparedDecoder):
        raise UnsupportedModelError(
            f"a prefix is held by a prepared model, not by a {type(model).__name__}: pass "
            "prepare(model), then make the sim of it."
        )
    if carries_alpha(model):
        raise UnfoldedError(
            "the model carries an α, which keys and values would hold: fold(sim) or detach(sim) "
            "first."
        )
    check_weights(model)


@torch.no_grad()
def hold(model: PreparedDecoder, tokens: Tensor) -> None:
    """`set_prefix` of a model and token ids (P,) that were checked."""
    blocks = model.part("blocks")
    with model.without_prefix():
        found: list[Tensor | None] = [None] * (2 * len(blocks))
        if len(tokens):
            cache = Recorded()
            row = tokens[None].to(next(model.parameters()).device)
            with (
                in_eval_mode(model),
                remove_all_quantizers(model),
                module_by_module_in_float32(model),
            ):
                model(row, cache=cache)
            dtype = next(model.parameters()).dtype
            found = [x.to(dtype) for x in cache.tensors]
    for block, key, value in zip(blocks, found[::2], found[1::2], strict=True):
        block.set_prefix(key, value)
    model.prefix = tuple(tokens.tolist())


def _checked(model: PreparedDecoder, ids: Tensor | Sequence[int]) -> Tensor:
    """The ids as int64 (P,)."""
    tokens = torch.as_tensor(ids).reshape(-1)
    if len(tokens):
        check_ids(tokens, "the prefix")
    tokens = tokens.long()
    size = model.part("embed").num_embeddings
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise DataError(
            f"the prefix is {tokens.tolist()}; the model knows 0 … {size - 1}. Use the tokenizer "
            "that belongs to this model."
        )
    positions = model.description.positions
    if positions is not None and len(tokens) >= positions:
        raise DataError(
            f"the prefix has {len(tokens)} tokens, the model {positions} positions: none is left "
            "for a text. One token is usually enough."
        )
    return tokens
