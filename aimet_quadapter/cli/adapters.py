"""LoRA adapters that a run writes for its HuggingFace checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .loading import Subject

if TYPE_CHECKING:
    from ..exporting.adapter_folder import Adapter

SUFFIX = ".adapters"
"""Behind the name of the checkpoint: the folder beside it that holds its adapters."""


class Adapters:
    """The adapters of a checkpoint, each in a folder of its own name.

    Args:
        sources: folders of adapters of the original.
        checkpoint: folder of the checkpoint.
    """

    def __init__(self, sources: Sequence[str], checkpoint: Path) -> None:
        self.checkpoint = checkpoint.resolve()
        self.folder = self.checkpoint.with_name(f"{self.checkpoint.name}{SUFFIX}")
        self.sources = [Path(source).expanduser().resolve() for source in sources]
        self.read: list[Adapter] = []

    @property
    def size(self) -> int:
        """Bytes that they take."""
        return sum(x.nbytes for adapter in self.read for x in adapter.weights.values())

    def check(self) -> None:
        """Read them; refuse what can be seen without the model.

        Raises:
            MissingRuntimeError: peft is not installed.
            DataError: no LoRA adapter, or two of one name.
            UnsupportedModelError: an adapter that is not folded.
            FileExistsError: an adapter is there already.
        """
        if not self.sources:
            return
        from ..artifacts.manifest import check_target
        from ..exporting.adapter_folder import read_adapter
        from ..exporting.adapter_proof import peft_model

        peft_model()
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"two adapters are called {twice[0]}, and {self.folder} has room for one of that "
                "name: rename a folder, or leave one out."
            )
        self.read = [read_adapter(source) for source in self.sources]
        for name in names:
            check_target(self.folder / name, overwrite=False)

    def check_fit(self, subject: Subject, shifted: bool) -> None:
        """Refuse adapters of another model, and what `compensate_softmax` would spoil.

        Raises:
            DataError, UnsupportedModelError: as `check_adapter` has it.
        """
        from ..exporting.adapter import check_adapter

        for adapter in self.read:
            check_adapter(adapter, subject.hf_model, subject.model, shifted)

    def write(
        self, sim: Any, subject: Subject, pairs: Iterable[Any], alphas: Mapping[str, Any]
    ) -> None:
        """Write each for the checkpoint, which it names as its base."""
        from ..exporting.adapter import fold_adapter

        chosen = tuple(pairs)
        for source in self.sources:
            target = self.folder / source.name
            fold_adapter(
                source, sim, subject.hf_model, chosen, alphas, target, base=self.checkpoint
            )
            print(f"LoRA adapter: {target}")
