"""Tasks of lm-evaluation-harness: accuracy, and what quantization changed in the answers."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, of_extra
from ..sim.values import check_weights
from .causal_lm import CausalLM
from .scores import eval_mode, module_of, weights_quantized_once
from .task_scores import TaskScores, leaves, scores_of
from .tokenization import prompt_prefix

if TYPE_CHECKING:
    from .harness import Beside, HarnessModel

SEED = 1234
"""Draws the examples before a question, and tokens where a task samples; the harness's own."""

DRAWS = 1000
"""Of the bootstrap, for the standard error of a metric that has no formula for it."""

UNKNOWN_WINDOW = 2048
"""Tokens that a model without a number of positions sees; the harness's own."""


def evaluate_tasks(
    model_or_sim: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    reference: Any = None,
    task_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> TaskScores:
    """Scores of a model on tasks of lm-evaluation-harness, and how far it is from a reference.

    Requests, batches, truncation from the left and metrics are the harness's. A text begins with
    what the tokenizer puts before it; behind a prefix that the model holds (`set_prefix`) it does
    not, as in deployment. With a reference each score has the reference's beside it, the flips,

        items correct in one of the two alone / items,

    and KL(reference ‖ model) over the tokens that are scored. docs/tasks.md shows a table.

    What becomes of NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        model_or_sim: a HuggingFace causal LM, a prepared model, any module that maps token ids
            (B, T) to logits (B, T, V), an AIMET sim of one of these, or
            `CpuSession(folder).module()`. Runs in eval mode; modes are put back.
        tokenizer: the model's, of `transformers`.
        tasks: names of tasks, groups or tags.
        reference: the model before quantization, in one of the same forms.
        task_dir: folder with tasks of your own (YAML); they come before the harness's.
        num_fewshot: examples before each question; what the task says when not given.
        limit: the first so many items of each task; all when not given.
        batch_size: rows in one forward pass.
        progress: say how far it is.

    Returns:
        The scores: `print` them, or `to_json()`.

    Raises:
        MissingRuntimeError: lm-eval is not installed.
        DataError: no such task, its data cannot be had, a question does not fit the model, a
            setting is not possible, or logits are not what they should be.
        SimError: neither a module nor a sim, or weights with NaN or inf.
    """
    _check_settings(tokenizer, tasks, limit, batch_size, num_fewshot)
    models = [CausalLM(module_of(model_or_sim), tokenizer.eos_token_id)]
    if reference is not None:
        models.append(CausalLM(module_of(reference), tokenizer.eos_token_id))
    for model in models:
        check_weights(model.module)
    harness_model, beside_model = _harness()
    first = _first_of_the_reference(models, tokenizer)
    window = _window(models, len(first))
    beside = beside_model(models[1], first) if reference is not None else None
    with _quiet_harness(), _prepared(models):
        loaded = _load(tasks, task_dir, num_fewshot)
        asked = harness_model(models[0], tokenizer, window, batch_size, beside, progress)
        found = _evaluate(asked, loaded, limit)
        other = None
        if reference is not None:
            alone = harness_model(models[1], tokenizer, window, batch_size, None, progress)
            other = _evaluate(alone, loaded, limit)
    return _result(found, other, asked, beside, limit)


def _harness() -> tuple[type[HarnessModel], type[Beside]]:
    with of_extra("eval", ("lm_eval", "accelerate"), "asks a model the questions of a task"):
        from .harness import Beside, HarnessModel
    return HarnessModel, Beside


def _check_settings(
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> None:
    if isinstance(tasks, str) or not tasks:
        raise DataError(f"tasks is {tasks!r}; give a list of names, such as ['piqa'].")
    for name, number, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
    ):
        if number is not None and (not isinstance(number, int) or number < least):
            raise DataError(f"{name} is {number}; it must be {least} or more, a whole number.")
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise DataError(
            f"tokenizer {type(tokenizer).__name__} has no EOS token, which ends a generated text "
            "and stands before one that has nothing before it. Load the model's own tokenizer."
        )


def _first_of_the_reference(models: Sequence[CausalLM], tokenizer: Any) -> list[int]:
    """Tokens that the reference reads before the model's rows, for the model holds them."""
    begin: list[int] = prompt_prefix(tokenizer).tolist()
    holds = [bool(model.prefix) for model in models]
    if holds == [False, True] and begin:
        raise DataError(
            f"the reference holds the prefix {list(models[1].prefix)} and the model none: rows "
            f"that begin with {begin} would be read twice. Give a reference without, or a model "
            "with a prefix."
        )
    return begin if holds == [True, False] else []


def _window(models: Sequence[CausalLM], first: int) -> int:
    """Tokens of a text that each of the models sees at once."""
    rooms = [model.room for model in models]
    if len(rooms) > 1 and rooms[1] is not None:
        rooms[1] -= first
    return min((room for room in rooms if room is not None), default=UNKNOWN_WINDOW)


def _load(
    tasks: Sequence[str], task_dir: str | Path | None, num_fewshot: int | None
) -> dict[str, Any]:
    """The tasks with their data."""
    from lm_eval.tasks import TaskManager

    if task_dir is not None and not Path(task_dir).is_dir():
        raise DataError(f"there is no folder {task_dir} with tasks.")
    manager = TaskManager(include_path=task_dir, include_defaults=False) if task_dir else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # it reads 10 000 files
        manager = TaskManager(include_path=task_dir)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise DataError(
                f"there is no task {name!r}{' in ' + str(task_dir) if task_dir else ''} nor in "
                f"lm-eval {version('lm_eval')}. "
                + (f"Near it: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them.")
            )
    try:
        loaded: dict[str, Any] = manager.load(list(tasks))
    except OSError as error:  # also what datasets raises without network
        reason = str(error).splitlines()[0]
        raise DataError(f"the data of {', '.join(tasks)} cannot be had: {reason}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise DataError(
                f"{name} runs code that the model writes, or shows it pictures: neither is done "
                "here. Leave it out."
            )
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Let it say what fails: what it warns of each task and each long request is told once here."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _prepared(models: Sequence[CausalLM]) -> Iterator[None]:
    """Eval mode, weights quantized once, and a seed of its own."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        for module in {id(model.module): model.module for model in models}.values():
            stack.enter_context(eval_mode(module))
            stack.enter_context(weights_quantized_once(module))
        yield


def _evaluate(asked: HarnessModel, loaded: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from lm_eval import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    torch.manual_seed(SEED)
    found: dict[str, Any] = evaluate(lm=asked, task_dict=loaded, limit=limit, bootstrap_iters=DRAWS)
    return found


def _result(
    found: dict[str, Any],
    other: dict[str, Any] | None,
    asked: HarnessModel,
    beside: Beside | None,
    limit: int | None,
) -> TaskScores:
    parts = found["group_subtasks"]
    divergences = {}
    for task in found["results"]:
        divergence = None if beside is None else beside.over(leaves(task, parts))
        if divergence is not None:
            divergences[task] = divergence
    return TaskScores(
        scores=tuple(scores_of(found, other)),
        divergences=divergences,
        truncated={task: count for task, count in asked.truncated.items() if count},
        window=asked.max_length,
        few_shot=dict(found["n-shot"]),
        limit=limit,
        versions={name: version(name) for name in ("lm_eval", "transformers", "torch")},
    )
