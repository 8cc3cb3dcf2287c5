"""The two graphs of `export_generation` as a model with a cache: read a prompt, then step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts.manifest import DECODE, GENERATION, PROMPT, read_manifest
from ..errors import DataError


def generation_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `export_generation` wrote.

    Raises:
        DataError: there is none, or it is another sort of folder.
    """
    manifest = read_manifest(folder)
    if manifest.get("kind") != GENERATION:
        raise DataError(
            f"{folder} holds no graphs for generation: pass a folder that export_generation(sim, "
            "...) wrote."
        )
    return manifest


def graph_files(folder: Path) -> tuple[Path, Path]:
    """The prompt graph and the one-token graph of a folder that `export_generation` wrote."""
    generation_manifest(folder)
    return folder / PROMPT, folder / DECODE


class State:
    """A cache of fixed size, as integers, and the mask over it.

    Attributes:
        past: "key_0", "value_0", … → keys or values (1, K, N − 1, D) of the tokens so far.
        mask: (1, 1, 1, N): 0 at a token so far and at the last place, the new token's.
        held: number of tokens so far, the prefix counted.
    """

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.past = {
            c["name"]: np.full(c["shape"], c["zero_point"], c["dtype"]) for c in manifest["cache"]
        }
        shape = (1, 1, 1, manifest["cache_length"])
        self.mask = np.full(shape, manifest["mask_value"], np.float32)
        self.mask[..., -1] = 0
        self.held = 0

    def add(self, new: list[np.ndarray], count: int) -> None:
        """Append the first `count` of new keys and values, in the order of the graphs' outputs."""
        end = self.held + count
        for held, values in zip(self.past.values(), new, strict=True):
            held[:, :, self.held : end] = values[:, :, :count]
        self.mask[..., :end] = 0
        self.held = end


class CachedGraphs:
    """ONNX Runtime sessions of both graphs, and what the manifest says of them.

    Args:
        folder: what `export_generation` returned.
        prompt: a session of its prompt graph.
        decode: a session of its one-token graph.
    """

    def __init__(self, folder: Path, prompt: Any, decode: Any) -> None:
        self.manifest = generation_manifest(folder)
        self.prompt = prompt
        self.decode = decode

    @property
    def vocabulary(self) -> int:
        """Number of tokens V."""
        return self.prompt.get_outputs()[0].shape[-1]

    @property
    def prefix(self) -> list[int]:
        """Tokens whose keys and values come before every prompt's, from the prompt graph."""
        return list(self.manifest.get("prefix", []))

    def read(self, ids: list[int]) -> tuple[State, np.ndarray]:
        """A cache that holds the T tokens of a prompt, and the logits (T, V) after each."""
        padded = np.zeros((1, self.manifest["prompt_length"]), np.int64)  # hidden: they come later
        padded[0, : len(ids)] = ids
        logits, *new = self.prompt.run(None, {"input_ids": padded})
        state = State(self.manifest)
        state.add(new, len(self.prefix) + len(ids))
        return state, logits[0, : len(ids)]

    def step(self, state: State, token: int) -> np.ndarray:
        """The logits (V,) after one token more, which the cache then holds if there is room."""
        feeds = {
            "input_ids": np.array([[token]], np.int64),
            "position_ids": np.array([[state.held]], np.int64),
            "mask": state.mask,
            **{f"past_{name}": values for name, values in state.past.items()},
        }
        logits, *new = self.decode.run(None, feeds)
        if state.held < self.manifest["cache_length"] - 1:
            state.add(new, 1)
        return logits[0, 0]
