"""The model card of the default model."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .recipe import Recipe

CARD = """\
---
license: psf-2.0
language: en
tags: [gpt2, quantization, test-model]
---
# The default model of aimet_quadapter

A small GPT-2 ({layers} layers, width {width}, {heads} heads, {positions} positions, vocabulary
{vocabulary}, {parameters:,} parameters, float16) for trying quantization without a download. It
writes text that looks like Python's documentation. It is of no other use.

## How it was made
`recipes/train_default_model.py`, seed {seed}, {steps} steps of {batch} x {positions} tokens,
{minutes:.1f} minutes on {threads} CPU thread(s); Python {python}, torch {torch},
transformers {transformers}. The text is what every Python carries: the help topics of
`pydoc_data.topics`, and the docstrings and comments of the standard library, read as text.
A module or topic belongs to a split by the SHA-256 of its name: of 20 buckets one is `valid`, one
`test`, the others `train` ({train_tokens:,} tokens).
`calibration.txt` is from `valid`, `heldout.txt` from `test`; neither was trained on.

## Its outlier channels are made on purpose
Large GPT-2 models have activation channels far larger than the rest, which is what makes 8-bit
quantization ruin them. A model of this size does not grow them. Before the first training step
every LayerNorm was therefore given the following, in the same channels everywhere, and the
network was trained with them in place:

- {gain_channels} *gain* channels: weight {gain[0]:g} to {gain[1]:g} instead of 1. The weight
  shows the outlier, so cross-layer equalization (CLE), which looks at weights, can undo these.
- {offset_channels} *offset* channels: bias {offset[0]:g} to {offset[1]:g} (either sign) instead
  of 0, weight bias^{offset_gain_power:g}: nearly constant, far from zero, as the massive
  activations of large models are.

The consumers' weights on these channels started smaller by the channel's size, and the
optimizers' steps on them were shorter by size^{step_power:g}. All of it was trained.

One thing was done after training: the norm weight of the offset channels was set to
{offset_gain:g}. The network reads these channels as constants, so its perplexity moved by less
than 1e-5 of itself; but CLE is misled by it. **How far CLE falls behind is therefore a choice
made here, not a finding.** A method that sees activations (SmoothQuant, Quadapter) is not misled.

## Measured
Perplexity in float32 over windows of {positions} tokens: `calibration.txt` {ppl_calibration:.2f},
`heldout.txt` {ppl_heldout:.2f}.

{figures}
## Licence
The weights and the two excerpts derive from the documentation inside CPython's standard library:
Copyright (c) 2001 Python Software Foundation; All Rights Reserved. Python Software Foundation
License Version 2, https://docs.python.org/3/license.html. The changes made: code removed,
comment signs removed, texts cut and joined.
"""


def write_card(folder: Path, recipe: Recipe, facts: dict[str, object]) -> None:
    """Write the model card."""
    values = {**asdict(recipe), **asdict(recipe.outliers), **facts}
    values |= {"python": platform.python_version(), "torch": torch.__version__}
    values |= {"transformers": transformers.__version__, "threads": torch.get_num_threads()}
    (folder / "README.md").write_text(CARD.format(**values), encoding="utf-8")
