"""The model card of a HuggingFace checkpoint: what was done, to what, measured how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from ..artifacts.manifest import bit_widths, versions
from ..models import PreparedDecoder


def model_card(
    sim: Any,
    hf_model: PreTrainedModel,
    pairs: Sequence[str],
    perplexities: Mapping[str, float],
    same_function: bool,
    notes: str,
) -> str:
    """README.md of a checkpoint, with the metadata that the hub reads.

    Args:
        sim: the folded sim.
        hf_model: the model it was made of.
        pairs: names of the pairs whose α is folded in.
        perplexities: name → perplexity.
        same_function: whether it computes what the original does.
        notes: Markdown for the end.
    """
    model: PreparedDecoder = sim.model
    source = str(getattr(hf_model, "name_or_path", "") or "")
    facts: dict[str, Any] = {"library_name": "transformers", "tags": ["quadapter", "aimet"]}
    if source and not Path(source).exists():  # a folder of this machine says nothing elsewhere
        facts = {"base_model": source} | facts
    name = source.rstrip("/").rpartition("/")[2] or model.hf_class
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}, its channels scaled by Quadapter",
        "",
        f"A `{model.hf_class}` "
        + (
            "that computes in floating point what the original does and loses less when it is "
            "quantized"
            if same_function
            else "whose weights were trained to lose less when it is quantized; in floating point "
            "it is another model than the original"
        )
        + ": one scale per channel was learned and multiplied into its weights "
        "([Quadapter](https://aclanthology.org/2022.findings-emnlp.185/)). There is no quantizer "
        "in it, and no operation more than in the original.",
        "",
        f"- quantizers that the scales were learned for: {_widths(sim)}",
    ]
    if pairs:
        lines.append(f"- pairs of producer and consumers that were scaled: {len(pairs)}")
    if model.prefix:
        lines.append(
            f"- the scales were learned behind the tokens {list(model.prefix)}, which are not in "
            "this checkpoint: send them before every text to have the same ranges"
        )
    lines.append("- made with " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if perplexities:
        lines += ["", "## Measured", "", "| | perplexity |", "| --- | --- |"]
        lines += [f"| {row} | {value:.3f} |" for row, value in perplexities.items()]
    if notes:
        lines += ["", notes.strip()]
    return "\n".join([*lines, ""])


def _widths(sim: Any) -> str:
    """Kinds of quantizers with their bits, the most frequent first."""
    kinds = {"weight": "weights", "output": "activations"}
    found = bit_widths(sim)
    parts = []
    for kind, label in kinds.items():
        widths = sorted(found.get(kind, {}).items(), key=lambda item: -item[1])
        if widths:
            parts.append(f"{label} {', '.join(f'{bits} ({count})' for bits, count in widths)}")
    return "; ".join(parts) or "none that has a range"
