"""A model and tokens → numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError, SimError
from ..progress import progress as report_progress
from ..sim.outputs import ROWS_AT_ONCE, check_vocabulary_of, logits_place
from ..sim.values import check_ids, check_weights


class Window(NamedTuple):
    """Tokens `begin` … `end` − 1 go through the model; those from `first` on are scored."""

    begin: int
    end: int
    first: int


def perplexity(
    model_or_sim: Any,
    tokens: Tensor,
    window: int = 1024,
    stride: int | None = None,
    *,
    prefix: Tensor | Sequence[int] = (),
    batch_size: int = 1,
    progress: bool = True,
) -> float:
    """exp(mean negative log-likelihood of a token), every scored token weighing the same.

        exp(−1/N Σ_t log p(x_t | x_{<t} inside the window))

    Without `stride` the windows follow each other and the first token of each is not scored, for
    it has nothing before it; a last window of one token is left out. With `stride < window` a
    window starts every `stride` tokens and only its new tokens are scored, as in transformers'
    "Perplexity of fixed-length models"; that recipe weighs a window by one token less than it
    scores, here every token counts once.

    With `prefix` every window begins with these tokens, as a prompt does, and the same tokens of
    the text are scored as without in windows of `window` − P.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        model_or_sim: a HuggingFace causal LM, a prepared model, any module that maps token ids
            (B, T) to logits (B, T, V), or an AIMET sim of one of these. Runs in eval mode; the
            mode of each of its modules is put back.
        tokens: token ids (N,) or (1, N), N ≥ 2, of an integer type, on any device.
        window: tokens a forward pass sees, those of the prefix included; at least 2 of the text.
        stride: tokens between the starts of two windows, 1 … `window`; `window` when not given.
        prefix: token ids (P,) before every window, such as `prompt_prefix(tokenizer)`: a model
            that was trained behind BOS is another one without it.
        batch_size: windows in one forward pass.
        progress: say how far it is.

    Returns:
        The perplexity.

    Raises:
        DataError: tokens, window or stride are not as above, the window has more positions than
            the model, or logits are not of shape (B, T, V) or hold NaN or inf.
        SimError: `model_or_sim` is neither a module nor a sim, or its weights hold NaN or inf.
    """
    model = module_of(model_or_sim)
    check_weights(model)
    ids = _checked_tokens(tokens, model)
    begin = _checked_prefix(prefix, model)
    window -= len(begin)
    _check_windows(window, stride, batch_size, len(ids), len(begin), model)
    windows = list(_windows(len(ids), window, stride or window))
    device = next((p.device for p in model.parameters()), ids.device)
    begin = begin.to(ids.device)
    batches = list(_batches(windows, batch_size))

    total = 0.0
    with torch.no_grad(), eval_mode(model), weights_quantized_once(model):
        for batch in report_progress(batches, "perplexity", enabled=progress):
            rows = [torch.cat((begin, ids[w.begin : w.end])) for w in batch]
            x = torch.stack(rows).to(device)  # (B, P + T)
            logits = logits_of(model, x)[:, len(begin) :]  # (B, T, V)
            x = x[:, len(begin) :]
            total += sum(map(_nll, logits, x, batch))
    scored = sum(w.end - w.first for w in windows)
    return math.exp(min(total / scored, 709.0))  # e^709: the largest a float holds


def weights_quantized_once(model: nn.Module) -> AbstractContextManager[None]:
    """Quantize a sim's weights once for a while; AIMET is imported only where there is a sim."""
    if not any(hasattr(module, "param_quantizers") for module in model.modules()):
        return nullcontext()
    from ..sim.weights import quantized_once

    return quantized_once(model)


def _windows(length: int, window: int, stride: int) -> Iterator[Window]:
    seen = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        first = max(seen, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        seen = end
        if end == length:
            return


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Windows in their order; only those of one length go together."""
    batch: list[Window] = []
    for one in windows:
        if batch and (len(batch) == size or one.end - one.begin != batch[0].end - batch[0].begin):
            yield batch
            batch = []
        batch.append(one)
    yield batch


def _nll(logits: Tensor, ids: Tensor, where: Window) -> float:
    """Sum of −log p over the scored tokens of one window; logits (T, V), ids (T,)."""
    skip = where.first - where.begin
    logits, targets = logits[skip - 1 : -1], ids[skip:]
    total = 0.0
    for some, wanted in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        total += nn.functional.cross_entropy(some.float(), wanted, reduction="sum").item()
    if not math.isfinite(total):
        raise DataError(
            f"the loss of tokens {where.first} … {where.end - 1} is {total}: the model's logits "
            "hold NaN or inf there. Check its weights, its quantizers' ranges, or run it in fp32."
        )
    return total


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of token ids (B, T), whatever the model returns them in.

    Raises:
        DataError: it returns none.
    """
    output = model(ids)
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list):
        outputs = [y for y in logits if isinstance(y, Tensor)]
        place = logits_place(outputs, model)
        logits = output if place is None else outputs[place]
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape:
        check_vocabulary_of(logits, ids)
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    raise DataError(
        f"the model returned {got} for token ids of shape {tuple(ids.shape)}; logits of shape "
        "(batch, length, vocabulary) are needed. Pass a causal language model."
    )


def module_of(model_or_sim: Any) -> nn.Module:
    """The module itself, or that of a sim; SimError for anything else."""
    if isinstance(model_or_sim, nn.Module):
        return model_or_sim
    model = getattr(model_or_sim, "model", None)
    if isinstance(model, nn.Module):
        return model
    raise SimError(
        f"a torch module or an AIMET sim is needed, not {type(model_or_sim).__name__}. Pass the "
        "model itself or the QuantizationSimModel made from it."
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _checked_tokens(tokens: Tensor, model: nn.Module) -> Tensor:
    """The tokens as int64 (N,)."""
    if not isinstance(tokens, Tensor):
        raise DataError(
            f"tokens are {type(tokens).__name__}, not a tensor. Use torch.tensor(tokens), or "
            'tokenizer(text, return_tensors="pt").input_ids.'
        )
    shape = tuple(tokens.shape)
    if tokens.dim() not in (1, 2) or (tokens.dim() == 2 and shape[0] != 1):
        raise DataError(
            f"tokens have shape {shape}; one text of shape (N,) or (1, N) is needed. "
            "Join the rows first, or evaluate them one by one."
        )
    check_ids(tokens, "tokens")
    ids = tokens.reshape(-1).long()
    if len(ids) < 2:
        raise DataError(
            f"{len(ids)} token(s) given; at least 2 are needed, for the first has nothing before "
            "it to be predicted from. Check that the text is not empty."
        )
    low, high = int(ids.min()), int(ids.max())
    size = config_number(model, "vocab_size")
    if low < 0 or (size is not None and high >= size):
        allowed = f"0 … {size - 1}" if size is not None else "0 or more"
        raise DataError(
            f"token ids go from {low} to {high}; the model knows {allowed}. "
            "Use the tokenizer that belongs to this model."
        )
    return ids


def _checked_prefix(prefix: Tensor | Sequence[int], model: nn.Module) -> Tensor:
    """The prefix as int64 (P,)."""
    ids = torch.as_tensor(prefix, dtype=torch.long).reshape(-1)
    size = config_number(model, "vocab_size")
    if len(ids) and (int(ids.min()) < 0 or (size is not None and int(ids.max()) >= size)):
        raise DataError(
            f"the prefix is {ids.tolist()}; the model knows 0 … {(size or 0) - 1}. Use the "
            "tokenizer that belongs to this model: prompt_prefix(tokenizer)."
        )
    return ids


def _check_windows(
    window: int, stride: int | None, batch_size: int, length: int, prefix: int, model: nn.Module
) -> None:
    if window < 2:
        behind = f" behind a prefix of {prefix}" if prefix else ""
        raise DataError(f"window is {window}{behind}; at least 2 tokens are needed to score one.")
    if stride is not None and not 1 <= stride <= window:
        raise DataError(
            f"stride is {stride}; it must be between 1 and window = {window}, or tokens would be "
            "left out. Leave it away for windows that do not overlap."
        )
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be 1 or more.")
    positions = config_number(model, "max_position_embeddings")
    prefix += len(getattr(model, "prefix", ()))  # what a prepared model holds has positions too
    if positions is not None and min(window, length) + prefix > positions:
        raise DataError(
            f"window is {window + prefix}, but the model has {positions} positions. "
            f"Pass window={positions} or less."
        )


def config_number(model: nn.Module, name: str) -> int | None:
    """A number of the model's config; None where there is none."""
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None
