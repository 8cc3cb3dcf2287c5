"""Greedy generation with the two graphs of `export_generation`, on the CPU and on the HTP."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..artifacts.manifest import DECODE, PROMPT, tokenizer_in
from ..errors import CompileError, DataError
from ..evaluation.tokenization import prompt_prefix
from ..sim.values import check_ids
from .cached_graphs import CachedGraphs, graph_files
from .logit_differences import DEVIATION, share_of_range
from .sessions import CpuSession, HtpSession
from .weight_formats import doubtful_weights

Prompt = Any
"""Text, or token ids: a sequence, an array or a tensor (T,) or (1, T)."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        prompt: token ids of the prompt.
        ids: token ids after it, the token that ended it among them.
        text: what `ids` say; None when the folder holds no tokenizer.
        seconds: of the prompt graph, then of each run of the one-token graph.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None
    seconds: tuple[float, ...] = field(compare=False)

    @property
    def seconds_per_token(self) -> float:
        """Mean time of the one-token graph; of the prompt graph if it made the only token."""
        times = self.seconds[1:] or self.seconds
        return sum(times) / len(times)

    def __str__(self) -> str:
        return self.text if self.text is not None else " ".join(map(str, self.ids))


class Generator:
    """The two graphs, opened once, for any number of prompts. `on_cpu` and `on_htp` make one."""

    def __init__(self, folder: str | Path, prompt_session: Any, decode_session: Any) -> None:
        self.folder = Path(folder)
        self.graphs = CachedGraphs(self.folder, prompt_session, decode_session)
        self._tokenizer: Any = None

    @classmethod
    def on_cpu(cls, folder: str | Path) -> Generator:
        """With ONNX Runtime on the CPU, operation by operation; see `generate_on_cpu`."""
        return cls(folder, *(CpuSession(file).session for file in graph_files(Path(folder))))

    @classmethod
    def on_htp(
        cls,
        folder: str | Path,
        *,
        htp_arch: str = "73",
        soc_model: int | None = None,
        check: bool = True,
    ) -> Generator:
        """On Qualcomm's HTP, both graphs compiled now and checked; see `generate_on_htp`."""
        target: dict[str, Any] = {"htp_arch": htp_arch, "soc_model": soc_model}
        files = graph_files(Path(folder))
        made = cls(folder, *(HtpSession(file, **target).session for file in files))
        if check:
            made.check(cls.on_cpu(folder))
        return made

    def check(self, reference: Generator) -> tuple[float, float]:
        """Compare the logits of both graphs on an arbitrary prompt with another generator's.

        Returns:
            Mean difference of the prompt graph's and of the one-token graph's logits, as a share
            of their range in `reference`.

        Raises:
            CompileError: one is above `DEVIATION`: the compiler made something else of the graph.
        """
        shares = []
        pairs = zip(self._probe(), reference._probe(), strict=True)
        for file, (own, other) in zip((PROMPT, DECODE), pairs, strict=True):
            share = share_of_range(torch.from_numpy(own), torch.from_numpy(other))
            if not share <= DEVIATION:
                lines = [
                    f"{file} in {self.folder} was compiled into something else: its logits are off "
                    f"by {share:.1%} of their range on average, its arithmetic alone stays below "
                    f"{DEVIATION:.1%}. Export with another prompt_length or cache_length "
                    "(docs/generation.md, Traps), or compile for another htp_arch.",
                    *doubtful_weights(self.folder / file),
                ]
                raise CompileError("\n".join(lines))
            shares.append(share)
        return shares[0], shares[1]

    def _probe(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of every place of an arbitrary full prompt, and of one token more."""
        length = self.graphs.manifest["prompt_length"]
        ids = [(7 * i + 11) % self.graphs.vocabulary for i in range(length)]
        state, logits = self.graphs.read(ids)
        return logits, self.graphs.step(state, ids[0])

    def __call__(self, prompt: Prompt, n: int) -> Generation:
        """The n most likely tokens after the prompt, one after the other.

        Ends earlier after a token that ends a text by the model's generation config.

        Args:
            prompt: text (needs a tokenizer in the folder) or token ids, at most P.
            n: number of tokens, at most N + 1 less the prompt's and the prefix's.

        Raises:
            DataError: the prompt or `n` do not fit the graphs.
        """
        prompt_ids = self._tokens(prompt)
        self._check(prompt_ids, n)
        start = time.perf_counter()
        state, logits = self.graphs.read(prompt_ids)
        row = logits[-1]
        ids: list[int] = []
        seconds: list[float] = []
        while True:
            seconds.append(time.perf_counter() - start)
            ids.append(int(row.argmax()))
            if len(ids) == n or ids[-1] in self.graphs.manifest["end_tokens"]:
                return Generation(tuple(prompt_ids), tuple(ids), self._text(ids), tuple(seconds))
            start = time.perf_counter()
            row = self.graphs.step(state, ids[-1])

    def _check(self, ids: list[int], n: int) -> None:
        manifest, vocabulary = self.graphs.manifest, self.graphs.vocabulary
        longest = manifest["prompt_length"]
        cache = manifest["cache_length"] - len(self.graphs.prefix)
        if not ids:
            raise DataError("the prompt has no tokens: nothing says what to continue.")
        if len(ids) > longest:
            raise DataError(
                f"the prompt has {len(ids)} tokens, the prompt graph takes {longest}: shorten it, "
                f"or export_generation(..., prompt_length={len(ids)})."
            )
        if not isinstance(n, int) or n < 1:
            raise DataError(f"n is {n!r}: pass a number of tokens, at least 1.")
        if len(ids) + n - 1 > cache:
            raise DataError(
                f"n is {n}: after {len(ids)} tokens the cache of {cache} has room for "
                f"{cache - len(ids) + 1}. Ask for fewer, or export_generation(..., "
                f"cache_length={len(self.graphs.prefix) + len(ids) + n - 1})."
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise DataError(
                f"the prompt holds token {min(ids) if min(ids) < 0 else max(ids)}, the model has "
                f"0 … {vocabulary - 1}: use the model's own tokenizer."
            )

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not self._has_tokenizer():
                raise DataError(
                    f"the prompt is text and {self.folder} holds no tokenizer: pass token ids, or "
                    "export_generation(..., tokenizer=tokenizer)."
                )
            ids = list(self._load_tokenizer()(prompt)["input_ids"])
            first = prompt_prefix(self._load_tokenizer()).tolist()
            held = self.graphs.prefix[: len(first)] == first  # the model is behind it already
            return ids[len(first) :] if held and ids[: len(first)] == first else ids
        if isinstance(prompt, torch.Tensor):
            check_ids(prompt, "the prompt's tokens")
            prompt = prompt.detach().cpu()
        array = np.asarray(prompt)
        a_row = array.ndim > 0 and array.size == array.shape[-1]
        if not a_row or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"the prompt is {array.dtype} of shape {array.shape}: pass text, or token ids (T,) "
                "or (1, T)."
            )
        return [int(i) for i in array.reshape(-1)]

    def _text(self, ids: list[int]) -> str | None:
        return self._load_tokenizer().decode(ids) if self._has_tokenizer() else None

    def _has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer_config.json").is_file()

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = tokenizer_in(self.folder)
        return self._tokenizer


def generate_on_cpu(folder: str | Path, prompt: Prompt, n: int) -> Generation:
    """Generate greedily with ONNX Runtime on the CPU, operation by operation, as the files say it.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        folder: what `export_generation` returned.
        prompt: text (needs a tokenizer in the folder) or token ids, at most P.
        n: number of tokens, at most N + 1 less the prompt's; fewer come out if one of them ends
            the text.

    Returns:
        Token ids, their text if the folder holds a tokenizer, and times.

    Raises:
        MissingRuntimeError: onnxruntime is not installed.
        DataError: no such folder, or the prompt or `n` do not fit the graphs.
        IntegrityError: a file is not what the manifest says, or points outside the folder.
    """
    return Generator.on_cpu(folder)(prompt, n)


def generate_on_htp(
    folder: str | Path,
    prompt: Prompt,
    n: int,
    *,
    htp_arch: str = "73",
    soc_model: int | None = None,
) -> Generation:
    """Generate greedily on Qualcomm's HTP, without any help from the CPU.

    Each graph is compiled once a call and its logits are compared with the CPU's;
    `Generator.on_htp(folder)` keeps them for several prompts.
    On an x86 machine this is Qualcomm's emulation of the HTP: its arithmetic, not its speed.

    Args:
        folder: what `export_generation` returned.
        prompt: as in `generate_on_cpu`.
        n: as in `generate_on_cpu`.
        htp_arch: as in `compile_for_htp`.
        soc_model: as in `compile_for_htp`.

    Returns:
        As `generate_on_cpu`.

    Raises:
        MissingRuntimeError, CompileError, IntegrityError, DataError: as in `compile_for_htp`; the
            prompt or `n` do not fit the graphs; or the compiler made something else of a graph.
    """
    return Generator.on_htp(folder, htp_arch=htp_arch, soc_model=soc_model)(prompt, n)
