#!/usr/bin/env python3
"""Train a small GPT-2 from local text, to run the paper's experiments without a hub.

Six layers, 384 wide: three times the model inside the package. It learns from the given files
alone and has the same outlier channels from the start (see `training.recipe.Outliers`).
What is measured on it says how the methods compare on such a model, and nothing about OpenAI's.

    python recipes/train_small_gpt2.py TEXT_DIR/{novels,children}/train.txt TEXT_DIR/ptb/valid.txt

takes at most 30 minutes on 2 cores. A text that an experiment fine-tunes on or measures must not
be among the files. docs/reproducing.md has the experiments on this model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from training.fit import save_model, train
from training.recipe import Recipe
from training.tokenizer import encode, save_tokenizer, train_tokenizer

SIZE = Recipe(layers=6, width=384, heads=6, vocabulary=4096)
RECORD = "training.json"


def read(files: list[Path]) -> list[str]:
    """The texts of the files."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(
                f"train_small_gpt2.py: error: {file}: {error}. Give UTF-8 text files; "
                "iconv -f LATIN1 -t UTF-8 converts."
            )
    return texts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="UTF-8 text to learn from")
    add("--output", type=Path, default=Path("build/small-gpt2"), help="folder (%(default)s)")
    for name in ("layers", "width", "heads", "vocabulary", "steps", "batch", "seed"):
        add(f"--{name}", type=int, default=getattr(SIZE, name), help="(%(default)s)")
    add("--threads", type=int, default=2, help="CPU threads to use (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Read, train, save, with a record of what made it."""
    arguments = vars(parse_arguments())
    files, output = arguments.pop("files"), arguments.pop("output")
    torch.set_num_threads(arguments.pop("threads"))
    recipe = Recipe(**arguments)
    texts = read(files)
    tokenizer = train_tokenizer(texts, recipe)
    tokens = encode(tokenizer, texts)
    if len(tokens) <= recipe.positions:
        sys.exit(
            f"train_small_gpt2.py: error: the files have {len(tokens)} tokens, one window has "
            f"{recipe.positions}. Give more text."
        )
    print(f"{len(tokens):,} training tokens", flush=True)
    model, seconds = train(recipe, tokens)
    output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, output)
    save_model(model, output)
    record = {
        "recipe": asdict(recipe),
        "texts": {
            "/".join(f.parts[-2:]): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
        },
        "tokens": len(tokens),
        "parameters": model.num_parameters(),
        "minutes": round(seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"saved to {output} after {seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    main()
