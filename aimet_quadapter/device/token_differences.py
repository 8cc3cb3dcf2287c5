"""A generated text beside what the sim would have said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SimError
from .generator import Generation

TIE = 1.01
"""Steps of the logits within which two tokens are as likely: one, and its rounding in fp32."""


@dataclass(frozen=True)
class TokenDifference:
    """A place where the sim would have gone on otherwise.

    Attributes:
        place: index into `Generation.ids`.
        token: what was generated.
        expected: the sim's most likely token after the same text.
        gap: the sim's logit of `expected` less that of `token`, in quantization steps of the
            logits.
    """

    place: int
    token: int
    expected: int
    gap: float

    def __str__(self) -> str:
        return (
            f"token {self.place}: {self.token}, the sim says {self.expected} "
            f"(by {self.gap:.2f} steps)"
        )


@dataclass(frozen=True)
class Comparison:
    """A generation beside the sim's greedy choice after the same text, place by place.

    Without differences the two texts are equal.

    Attributes:
        tokens: number of places.
        differences: where the sim would have gone on otherwise.
    """

    tokens: int
    differences: tuple[TokenDifference, ...]

    @property
    def equal(self) -> int:
        """Tokens before the first difference: so far the text is the sim's."""
        return self.differences[0].place if self.differences else self.tokens

    @property
    def explained(self) -> bool:
        """Whether every difference is a tie: the sim prefers its token by at most one step."""
        return all(d.gap <= TIE for d in self.differences)

    def __str__(self) -> str:
        lines = [
            f"{self.equal} of {self.tokens} tokens are the sim's text, "
            f"{self.tokens - len(self.differences)} are its choice after the same text"
        ]
        return "\n".join([*lines, *map(str, self.differences)])


def compare_generation(sim: Any, generation: Generation) -> Comparison:
    """What the sim would have said at every place of a generated text.

    The sim reads prompt and generated tokens once, without a cache. Its choice is the first of
    its largest logits, as ONNX Runtime's is.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: the sim that was exported.
        generation: what `generate_on_cpu` or `generate_on_htp` returned.

    Raises:
        SimError: the sim's weights hold NaN or inf, its model is not one that `prepare` made, or
            its logits carry no encoding, so there is no step to measure in.
    """
    from aimet_torch.utils import in_eval_mode  # loaded by whoever has a sim

    from ..encodings.sources import output_quantizer
    from ..sim.checks import check_sim

    check_sim(sim)
    if not hasattr(sim.model, "dummy_input"):
        raise SimError(
            f"{type(sim.model).__name__} is not a model that prepare made: nothing says what its "
            "logits carry. Pass the sim that was given to export_generation."
        )
    quantizer = output_quantizer(sim.model)
    if quantizer is None or not quantizer.is_initialized():
        raise SimError(
            "the sim's logits carry no encoding, so nothing says what a tie is: pass the sim that "
            "was exported."
        )
    step = float(quantizer.get_scale().detach())
    device = next(sim.model.parameters()).device
    ids = torch.tensor([[*generation.prompt, *generation.ids[:-1]]], device=device)
    with torch.no_grad(), in_eval_mode(sim.model):
        logits = sim.model(ids)[0, len(generation.prompt) - 1 :].float().cpu().numpy()  # (n, V)
    differences = []
    for place, (row, token) in enumerate(zip(logits, generation.ids, strict=True)):
        expected = int(row.argmax())
        if expected != token:
            gap = float(row[expected] - row[token]) / step
            differences.append(TokenDifference(place, token, expected, gap))
    return Comparison(len(generation.ids), tuple(differences))
