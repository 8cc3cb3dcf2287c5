#!/usr/bin/env python3
"""Train the small language model that ships inside the package.

The model is a four-layer GPT-2 that learns English technical prose from the text every Python
carries: the help topics of ``pydoc_data.topics`` and the docstrings and comments of the standard
library, read as text (``ast`` and ``tokenize``) and never executed. No network is used.

A small model that is trained in the ordinary way has no outlier channels, so 8-bit quantization
does not hurt it and there would be nothing to repair. Large GPT-2 models do have them. This
recipe therefore puts outlier channels into every LayerNorm *before* training, and the network
learns with them in place; see `training.recipe.Outliers` for what they are.

    python recipes/train_default_model.py                       # 24 minutes on 1 busy core
    python recipes/train_default_model.py --steps 50 --output build/try

Writes ``model.safetensors`` (float16), ``config.json``, the tokenizer, ``calibration.txt``,
``heldout.txt`` and the model card ``README.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from training.card import write_card
from training.fit import perplexity, save_model, train
from training.prose import collect_text, excerpt
from training.recipe import Outliers, Recipe
from training.tokenizer import encode, save_tokenizer, train_tokenizer

PACKAGE = Path(__file__).resolve().parents[1] / "aimet_quadapter"
DEFAULT_OUTPUT = PACKAGE / "evaluation" / "default_model"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    parser.add_argument("--plain", action="store_true", help="train without outlier channels")
    parser.add_argument("--figures", type=Path, help="Markdown to put into the model card")
    return parser.parse_args()


def main() -> None:
    """Collect, train, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    outliers = Outliers(gain_channels=0, offset_channels=0) if arguments.plain else Outliers()
    chosen = {name: getattr(arguments, name) for name in ("steps", "batch", "seed")}
    recipe = Recipe(**chosen, outliers=outliers)
    texts = collect_text()
    for split, parts in texts.items():
        print(f"{split:5s} {len(parts):4d} texts {sum(map(len, parts)):9,d} characters")
    tokenizer = train_tokenizer(texts["train"], recipe)
    tokens = encode(tokenizer, texts["train"])
    print(f"{len(tokens):,} training tokens")
    model, seconds = train(recipe, tokens)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {
        "minutes": seconds / 60,
        "train_tokens": len(tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "figures": arguments.figures.read_text(encoding="utf-8") if arguments.figures else "",
    }
    for name, split in (("calibration", "valid"), ("heldout", "test")):
        text = excerpt(texts[split], recipe.excerpt_bytes)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        facts[f"ppl_{name}"] = perplexity(model, encode(tokenizer, [text]), recipe.positions)
        print(f"{name}: {len(text.encode()):,} bytes, perplexity {facts[f'ppl_{name}']:.2f}")
    save_tokenizer(tokenizer, folder)
    save_model(model, folder)
    write_card(folder, recipe, facts)
    print(f"saved to {folder} after {seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    main()
