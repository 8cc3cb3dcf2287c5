"""A module whose parts lie where HuggingFace's model has them."""

from __future__ import annotations

from typing import Any

from torch import nn


class Parts(nn.Module):
    """Modules by what they are (`q`, `down`), each under HuggingFace's name for it.

    A name of several steps ("self_attn.q_proj") lies in plain modules of those names.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[str, str] = {}

    def put(self, part: str, path: str, module: nn.Module) -> None:
        """Add a module at a path, as the part of that name."""
        *holders, name = path.split(".")
        holder: nn.Module = self
        for step in holders:
            if not hasattr(holder, step):
                holder.add_module(step, nn.Module())
            holder = getattr(holder, step)
        holder.add_module(name, module)
        self._paths[part] = path

    def take_out(self, part: str) -> None:
        """Remove a part and its module."""
        holder, _, name = self._paths.pop(part).rpartition(".")
        delattr(self.get_submodule(holder), name)

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return part in self._paths

    def part(self, part: str) -> Any:
        """The module that stands for a part now: AIMET puts its own in place of ours."""
        return self.get_submodule(self._paths[part])

    def path(self, part: str) -> str:
        """HuggingFace's name for a part."""
        return self._paths[part]

    def apply_if(self, part: str, x: Any) -> Any:
        """What a part makes of x; x where there is no such part."""
        return self.part(part)(x) if part in self._paths else x
