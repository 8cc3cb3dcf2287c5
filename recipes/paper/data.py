"""What a run learns from and is measured on: token ids of its texts, cut as its settings say."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from aimet_quadapter import DataError, calibration_samples, prompt_prefix

from .experiment import RunSpec
from .model import Model


class Data:
    """The texts of one run."""

    def __init__(self, run: RunSpec, model: Model) -> None:
        self.run = run
        self.settings = run.settings
        self.model = model

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Text and split → sha256, of all that the run reads."""
        run, settings = self.run, self.settings
        sources = {(t, settings["evaluation"]["split"]) for t in settings["evaluation"]["texts"]}
        sources |= {(t, settings["evaluation"]["split"]) for t in settings["watch"]["texts"]}
        sources |= {(settings["calibration"]["text"], settings["calibration"]["split"])}
        sources |= {(t, settings["finetuning"]["split"]) for t in run.finetune_texts}
        for source in sorted(sources):
            self.model.ids(*source)
        return {f"{t}/{s}": self.model.sha256[f"{t}/{s}"] for t, s in sorted(sources)}

    def check(self) -> None:
        """Raise DataError unless the texts give the windows asked for and the model takes them."""
        settings, model = self.settings, self.model.loaded[0]
        positions = getattr(model.config, "max_position_embeddings", None)
        lengths = {"evaluation.window": settings["evaluation"]["window"]}
        lengths["calibration.length"] = settings["calibration"]["length"]
        if self.run.finetune_texts:
            lengths["finetuning.length"] = settings["finetuning"]["length"]
        for key, length in lengths.items():
            if positions is not None and length > positions:
                raise DataError(f"{key} is {length}; the model has {positions} positions.")
        self.samples()
        if self.run.finetune_texts:
            self.windows(torch.Generator().manual_seed(self.run.seed))

    def samples(self) -> list[Tensor]:
        """Calibration samples, each (1, T), that the seed draws."""
        chosen, measured = self.settings["calibration"], self.settings["evaluation"]
        ids = self.model.ids(chosen["text"], chosen["split"])
        seen = torch.cat([self.model.ids(t, measured["split"]) for t in measured["texts"]])
        count, length = chosen["samples"], chosen["length"]
        return calibration_samples(ids, count, length, self.run.seed, seen, prefix=self.prefix)

    @cached_property
    def prefix(self) -> Tensor:
        """What every window begins with, as the model's prompts do: (P,)."""
        return prompt_prefix(self.model.loaded[1])

    def windows(self, generator: torch.Generator) -> Tensor:
        """Fine-tuning windows (N, T)."""
        chosen = self.settings["finetuning"]
        data = self.model.windows(
            self.run.finetune_texts,
            chosen["split"],
            chosen["samples"],
            chosen["length"],
            generator,
        )
        if len(data) < chosen["batch"]:
            raise DataError(
                f"{len(data)} windows of {chosen['length']} tokens do not make a batch of "
                f"{chosen['batch']}: take more samples, a longer text or a smaller batch."
            )
        return data

    def batches(self) -> Iterator[Tensor]:
        """Fine-tuning batches (B, T) without end, in an order the seed decides."""
        generator = torch.Generator().manual_seed(self.run.seed)
        data = self.windows(generator)
        size = self.settings["finetuning"]["batch"]
        while True:
            for rows in torch.randperm(len(data), generator=generator).split(size):
                if len(rows) == size:
                    yield data[rows]

    def evaluation(self, text: str, count: int | None) -> Tensor:
        """The first ids of a text that is measured on, all without `count`: (N,)."""
        return self.model.ids(text, self.settings["evaluation"]["split"])[:count]
