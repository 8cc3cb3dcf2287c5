"""Scores of tasks, and how far a model's answers are from its reference's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Flips:
    """Items whose correctness is not the reference's (Dutta et al., 2024).

    Two models can have one accuracy and differ on many items: as many are lost as are won.

    Attributes:
        to_incorrect: items that the reference has right and the model wrong.
        to_correct: the other way round.
        items: all of them.
    """

    to_incorrect: int
    to_correct: int
    items: int

    @property
    def share(self) -> float:
        """Of the items, both ways together."""
        return (self.to_incorrect + self.to_correct) / self.items


@dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ model) of the next-token distributions, mean over the tokens scored, in nats.

    Attributes:
        mean: Σ KL / `tokens`.
        tokens: positions at which an answer or a text was scored; one that several answers of one
            token share counts once.
    """

    mean: float
    tokens: int


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: its name.
        metric: name of the metric, with the name of its filter where there are several.
        value: the score.
        error: its standard error; None where lm-evaluation-harness gives none.
        items: how many were scored.
        reference: the score of the reference; None without one.
        flips: None without a reference, or where an item is not right or wrong.
    """

    task: str
    metric: str
    value: float
    error: float | None
    items: int
    reference: float | None = None
    flips: Flips | None = None


@dataclass(frozen=True)
class TaskScores:
    """What `evaluate_tasks` found: `print` it, or `to_json()`.

    Attributes:
        scores: each metric of each task.
        divergences: task → how far the reference is; none of a task that only generates.
        truncated: task → requests that were longer than `window` and lost their beginning.
        window: tokens of a text that the model saw at once.
        few_shot: task → examples before each question.
        limit: items of each task that were taken; None for all.
        versions: of the packages that decide a score.
    """

    scores: tuple[TaskScore, ...]
    divergences: Mapping[str, Divergence]
    truncated: Mapping[str, int]
    window: int
    few_shot: Mapping[str, int]
    limit: int | None
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        compared = any(score.reference is not None for score in self.scores)
        head = ["task", "metric", "items", "value", "±"]
        head += ["reference", "flips", "to incorrect", "to correct", "KL"] if compared else []
        rows = [head, *(self._row(score, compared) for score in self.scores)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if self.limit is not None:
            lines.append(f"the first {self.limit} items of each task")
        lines += [
            f"{task}: {count} requests longer than {self.window} tokens lost their beginning"
            for task, count in self.truncated.items()
            if count
        ]
        return "\n".join(lines)

    def _row(self, score: TaskScore, compared: bool) -> list[str]:
        row = [score.task, score.metric, str(score.items), _number(score.value)]
        row.append(_number(score.error))
        if not compared:
            return row
        row.append(_number(score.reference))
        flips = score.flips
        row += (
            ["–"] * 3
            if flips is None
            else [f"{flips.share:.2%}", str(flips.to_incorrect), str(flips.to_correct)]
        )
        divergence = self.divergences.get(score.task)
        return [*row, "–" if divergence is None else f"{divergence.mean:.3g}"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def scores_of(found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[TaskScore]:
    """Each metric of each task and group in the results of lm-evaluation-harness.

    Args:
        found: what its `evaluate` returned, with samples.
        reference: the same of the reference, on the same items.
    """
    beside = reference["results"] if reference else {}
    scores = []
    for task, numbers in found["results"].items():
        keys = [k for k, v in numbers.items() if "," in k and _is_number(v)]
        metrics = [key for key in keys if not key.partition(",")[0].endswith("_stderr")]
        several = len({key.partition(",")[2] for key in metrics}) > 1
        for key in metrics:
            metric, _, kind = key.partition(",")
            error = numbers.get(f"{metric}_stderr,{kind}")
            better = found["higher_is_better"].get(task, {}).get(metric)
            score = TaskScore(
                task=task,
                metric=f"{metric}, {kind}" if several else metric,
                value=float(numbers[key]),
                error=float(error) if _is_number(error) else None,
                items=int(numbers["sample_len"]),
                reference=float(beside[task][key]) if reference else None,
                flips=_flips(found, reference, task, metric, kind)
                if reference and better is not False
                else None,
            )
            scores.append(score)
    return scores


def leaves(task: str, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group is made of, at any depth; of a task itself that task."""
    if not parts.get(task):
        return [task]
    return [leaf for part in parts[task] for leaf in leaves(part, parts)]


def _flips(
    found: Mapping[str, Any], reference: Mapping[str, Any], task: str, metric: str, kind: str
) -> Flips | None:
    pairs: list[tuple[Any, Any]] = []
    for leaf in leaves(task, found["group_subtasks"]):
        theirs = {(x["doc_id"], x["filter"]): x for x in reference["samples"][leaf]}
        for mine in found["samples"][leaf]:
            if mine["filter"] == kind and metric in mine:
                pairs.append((mine[metric], theirs[mine["doc_id"], kind][metric]))
    if not pairs or any(not _is_number(x) or x not in (0, 1) for pair in pairs for x in pair):
        return None
    lost = sum(bool(after < before) for after, before in pairs)  # numpy's are no JSON
    won = sum(bool(after > before) for after, before in pairs)
    return Flips(lost, won, len(pairs))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)  # numpy's too, which a task's own metric may give
