"""`quadapter eval MODEL --tasks …`: scores of a model or an export on tasks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import DataError
from .arguments import positive


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of `quadapter`."""
    parser = commands.add_parser(
        "eval",
        help="score a model or an export on tasks of lm-evaluation-harness",
        description="Score a HuggingFace model or an export on tasks of lm-evaluation-harness, and "
        "count what changed against a reference. Needs pip install 'aimet_quadapter[eval]'.",
    )
    add = parser.add_argument
    add("model", help="hub name or folder of a model, or a folder that export wrote")
    add("--tasks", required=True, metavar="A,B", help="names of tasks or groups")
    add("--task-dir", type=Path, metavar="DIR", help="folder with tasks of your own (YAML)")
    add("--reference", metavar="MODEL", help="the model before quantization, to compare with")
    add("--num-fewshot", type=int, metavar="N", help="examples before a question (the task's)")
    add("--limit", type=positive, metavar="N", help="the first so many items of each task (all)")
    add("--batch-size", type=positive, default=1, metavar="N", help="rows at once (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the scores there as JSON as well")
    parser.set_defaults(command=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Print the scores."""
    from transformers.utils import logging

    from ..evaluation.tasks import evaluate_tasks

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model, tokenizer = _load(args.model)
    reference = None if args.reference is None else _load(args.reference)[0]
    scores = evaluate_tasks(
        model,
        tokenizer,
        [name for name in args.tasks.split(",") if name],
        reference=reference,
        task_dir=args.task_dir,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    print(scores)
    if args.output:
        args.output.write_text(scores.to_json() + "\n", encoding="utf-8")


def _load(name: str) -> tuple[Any, Any]:
    """What scores are asked of, and its tokenizer: of an export its QDQ file on the CPU."""
    from ..artifacts.manifest import GENERATION, MANIFEST, read_manifest, tokenizer_in
    from ..device.sessions import CpuSession
    from .loading import model_and_tokenizer

    folder = Path(name)
    if not (folder / MANIFEST).is_file():
        return model_and_tokenizer(name)
    if read_manifest(folder).get("kind") == GENERATION:
        raise DataError(
            f"{folder} holds the graphs of export_generation, which give the logits of one token: "
            "pass the folder of export, of the same sim."
        )
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        raise DataError(f"{folder} has no tokenizer: export with tokenizer=....")
    return CpuSession(folder).module(), tokenizer
