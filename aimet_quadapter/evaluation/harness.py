"""lm-evaluation-harness's own requests to a HuggingFace model, answered by any model of ours.

Tokens, batches, truncation and stopping are its `HFLM`'s, so a score is what it is elsewhere. Needs
the extra `eval`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, pad

from ..errors import DataError
from ..progress import progress
from ..sim.outputs import ROWS_AT_ONCE
from .causal_lm import CausalLM
from .task_scores import Divergence


class Beside:
    """Another model on what the first one reads: the sum of KL(other ‖ first), task by task.

    Args:
        model: the other model, the reference.
        first: tokens (P,) that it reads before a text and the first model does not, for that one
            holds them. A text that begins with them already is read as it is.
    """

    def __init__(self, model: CausalLM, first: Sequence[int] = ()) -> None:
        self.model = model
        self.first = torch.tensor(first, dtype=torch.long, device=model.device)
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.tokens: Counter[str] = Counter()

    def rows(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits (T, V) of each row of token ids (B, T), token by token as the first model's."""
        ids = ids.to(self.model.device)
        count, (batch, length) = len(self.first), ids.shape
        begun = torch.full((batch,), count <= length, device=ids.device)
        if count <= length:
            begun &= (ids[:, :count] == self.first).all(1)
        behind = torch.cat((self.first.expand(batch, -1), ids), 1)
        x = torch.where(begun[:, None], pad(ids, (0, count)), behind)
        logits = self.model(x).logits
        for row, is_begun in zip(logits, begun.tolist(), strict=True):
            yield row[:length] if is_begun else row[count:]

    def add(self, task: str, log_probs: Tensor, logits: Tensor) -> None:
        """Count positions of a task: the first model's log p (N, V), the other's logits (N, V).

        Raises:
            DataError: they are not of one vocabulary, or hold NaN or inf.
        """
        if log_probs.shape != logits.shape:
            raise DataError(
                f"the model has {log_probs.shape[-1]} logits and its reference "
                f"{logits.shape[-1]}: no token of one is known to be one of the other. Give a "
                "reference with the same vocabulary."
            )
        logits = logits.to(log_probs.device)
        total = 0.0
        for mine, theirs in zip(
            log_probs.split(ROWS_AT_ONCE), logits.split(ROWS_AT_ONCE), strict=True
        ):
            wanted = log_softmax(theirs, -1, dtype=torch.float32)
            total += kl_div(mine, wanted, log_target=True, reduction="sum").item()
        if not math.isfinite(total):
            raise DataError(
                f"the divergence in {task} is {total}: the logits of one of the models hold NaN or "
                "inf. Check its weights, its quantizers' ranges, or run it in fp32."
            )
        self.sums[task] += total
        self.tokens[task] += len(logits)

    def over(self, tasks: Sequence[str]) -> Divergence | None:
        """The mean over all positions of some tasks; None where nothing was scored."""
        tokens = sum(self.tokens[task] for task in tasks)
        return Divergence(sum(self.sums[t] for t in tasks) / tokens, tokens) if tokens else None


class HarnessModel(HFLM):
    """A causal LM as lm-evaluation-harness takes one.

    A model that holds a prefix gets texts without what their tokenizer puts first: it is behind
    it already. Where nothing stands before what is scored, it gets the token that `HFLM` then puts
    there.

    Args:
        model: the model.
        tokenizer: its tokenizer; it is not changed.
        window: tokens of a text that the model sees at once; longer ones lose their beginning.
        batch_size: rows in one forward pass.
        beside: another model, to be asked the same.
        show: say how far it is.

    Attributes:
        truncated: task → requests that lost their beginning.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        window: int,
        batch_size: int = 1,
        beside: Beside | None = None,
        show: bool = True,
    ) -> None:
        self._holds_prefix = bool(model.prefix)
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a token for padding
            backend="causal",
            batch_size=batch_size,
            max_length=window,
            softmax_dtype="float32",
            add_bos_token=False if self._holds_prefix else None,
        )
        self.truncated: Counter[str] = Counter()
        self._beside = beside
        self._rows: Iterator[Tensor] = iter(())
        self._show = show
        self._task = ""

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: it would look the model up on the hub."""
        return {}

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """The ids of a text."""
        ids: list[int] = super().tok_encode(self._bare(string), *args, **kwargs)
        return ids

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The ids of texts, padded on their left, and the mask of the padding."""
        return super().tok_batch_encode([self._bare(s) for s in strings], *args, **kwargs)

    def _bare(self, text: str) -> str:
        """A text without the BOS that, say, a chat template wrote, if the model holds one."""
        return text.removeprefix(self.tokenizer.bos_token or "") if self._holds_prefix else text

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        """The log p of a continuation behind a context, and whether greedy search gives it."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        """The log p of a text."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        """What the model writes behind a context."""
        for request in requests:
            context, settings = request.args
            new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise DataError(
                    f"{request.task_name} has {new} tokens generated and the model sees "
                    f"{self.max_length} at once: none is left for the question. Take a longer "
                    "model or export, or a task with a smaller max_gen_toks."
                )
            too_long = len(self.tok_encode(context)) > self.max_length - new
            self.truncated[request.task_name] += too_long
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(
        self, ask: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """The answers in the order of the requests, one task at a time."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name, []).append(place)
        bars = self._show and not disable_tqdm and sys.stderr.isatty()
        answers: list[Any] = [None] * len(requests)
        for task, own in progress(list(places.items()), "tasks", enabled=self._show and not bars):
            self._task = task
            found = ask([requests[place] for place in own], disable_tqdm=not bars)
            for place, answer in zip(own, found, strict=True):
                answers[place] = answer
        return answers

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[Any]:
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation of {self._task} has {len(continuation)} tokens; 1 to "
                    f"{self.max_length} can be scored. Take a longer model or export, or leave the "
                    "task out."
                )
            total = len(context) + len(continuation)
            self.truncated[self._task] += total > self.max_length + 1
        if "override_bs" in kwargs:  # of a long text, called for each batch
            kwargs["disable_tqdm"] = True
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        if self._beside is not None:
            with torch.no_grad():
                self._rows = iter(list(self._beside.rows(inps)))
        return logits

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        """The rows of a batch come here one after the other, as log p; so do the reference's."""
        mine: Tensor = super()._select_cont_toks(logits, contlen, inplen)
        if self._beside is not None:
            theirs = super()._select_cont_toks(next(self._rows), contlen, inplen)
            self._beside.add(self._task, mine, theirs)
        return mine
