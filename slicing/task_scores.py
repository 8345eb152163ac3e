"""Scores of lm-eval tasks and groups, read from what lm-eval gives: what can't be had is None, with the reason.

Scores of single documents come with them, so that two models can be compared in pairs.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta

from slicing.structure import Structure
from slicing.task_set import Loaded, reason_of

Digits = Annotated[str, Meta(pattern="^[01]*$", description="digits 0 and 1")]


class Metric(Structure, omit_defaults=True):
    """One metric of a task."""

    value: Annotated[float | None, "null where it is no finite number"]
    stderr: Annotated[float | None, "its standard error; null where lm-eval has none"]
    documents: Annotated[
        Digits | list[float] | None,
        "where it is the mean over the documents, the score of each: a string of digits where each is 0 or 1, which"
        " takes a tenth of the room, else a list",
    ] = None


class TaskScore(Structure, omit_defaults=True):
    """Result of one task or group."""

    metric: Annotated[
        str | None,
        "stands for the task: acc_norm where there is one, else acc, else the task's first; null where lm-eval gives"
        " none",
    ]
    value: Annotated[float | None, "of that metric; null where there is none, or no finite number"]
    stderr: Annotated[float | None, "its standard error"]
    reason: Annotated[str | None, "why there is no value; null where there is one"]
    documents: Annotated[int, "documents evaluated"]
    metrics: Annotated[dict[str, Metric], "every metric by name"]
    subtasks: Annotated[
        dict[str, float | None] | None,
        "of a group, the value of its metric (of each task's own, where the group has none) for each task in it",
    ] = None


def no_score(reason: str, documents: int = 0) -> TaskScore:
    return TaskScore(metric=None, value=None, stderr=None, reason=reason, documents=documents, metrics={})


def task_score(result: dict[str, Any], documents_of: Mapping[str, Sequence[Any]] | None = None) -> TaskScore:
    """From lm-eval's flat result: keys "metric,filter" and "metric_stderr,filter". documents_of: what the task's own
    functions gave for each document, by the first of these keys."""
    metrics: dict[str, Metric] = {}
    said: dict[str, Any] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if kind == "none" else key
        number = _number(value)
        each = _of_documents((documents_of or {}).get(key, ()), number)
        metrics[name] = Metric(number, _number(result.get(f"{metric}_stderr,{kind}")), each)
        said[name] = value
    documents = int(result.get("sample_len", 0))
    if not metrics:
        return no_score("lm-eval gives no metric for it", documents)
    chosen = next((metric for metric in ("acc_norm", "acc") if metric in metrics), next(iter(metrics)))
    value = metrics[chosen].value
    return TaskScore(
        metric=chosen,
        value=value,
        stderr=metrics[chosen].stderr,
        reason=None if value is not None else f"{chosen} is {str(said[chosen])[:40]}, no finite number",
        documents=documents,
        metrics=metrics,
    )


def _number(value: Any) -> float | None:
    """A finite number as such, anything else as None: lm-eval's "N/A", what a metric of one's own returns."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _of_documents(scores: Sequence[Any], value: float | None) -> str | list[float] | None:
    """The scores of single documents as they are kept; None where the metric is not their mean."""
    numbers = [_number(score) for score in scores]
    known = [number for number in numbers if number is not None]
    if value is None or not known or len(known) < len(numbers):
        return None
    if not math.isclose(statistics.fmean(known), value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return "".join(f"{number:.0f}" for number in known) if set(known) <= {0.0, 1.0} else known


def document_scores(metric: Metric) -> list[float] | None:
    """The score of each document; None where they are not known."""
    return None if metric.documents is None else [float(score) for score in metric.documents]


def group_score(loaded: Loaded, name: str, scores: dict[str, TaskScore]) -> TaskScore:
    """A group's aggregate of its tasks' scores; where a task has none, neither has the group."""
    leaves = {leaf: scores[leaf] for leaf in loaded.leaves(name)}
    failed = {leaf: score.reason for leaf, score in leaves.items() if score.value is None}
    documents = sum(score.documents for score in leaves.values())
    if failed:
        leaf, reason = next(iter(failed.items()))
        score = no_score(f"{len(failed)} of its {len(leaves)} tasks have no score; {leaf}: {reason}", documents)
    else:
        try:
            flat = loaded.groups[name].aggregate({leaf: _flat(score) for leaf, score in leaves.items()})
            score = task_score(flat, _of_members(leaves.values()))
        except Exception as error:  # what is aggregated is the tasks' own
            score = no_score(reason_of(error), documents)
        if score.metric is None and score.reason is not None:
            score.reason = "its tasks have none of the metrics that it aggregates"
    metric = score.metric
    score.subtasks = {
        leaf: part.value if metric is None else part.metrics[metric].value
        for leaf, part in leaves.items()
        if metric is None or metric in part.metrics
    }
    return score


def _flat(score: TaskScore) -> dict[str, Any]:
    """A score as lm-eval has it, which `task_score` read."""
    flat: dict[str, Any] = {"sample_len": score.documents}
    for key, metric in score.metrics.items():
        name, _, kind = key.partition(",")
        flat[f"{name},{kind or 'none'}"] = metric.value
        flat[f"{name}_stderr,{kind or 'none'}"] = "N/A" if metric.stderr is None else metric.stderr
    return flat


def _of_members(scores: Iterable[TaskScore]) -> dict[str, list[float]]:
    """Scores of the documents of several tasks one after another, by lm-eval's keys, as far as all tasks have them: a
    group that weighs its tasks by size, as MMLU does, has their mean."""
    found: dict[str, list[float]] = {}
    every = [score.metrics for score in scores]
    for name in set.intersection(*map(set, every)):
        of_tasks = [document_scores(metrics[name]) for metrics in every]
        metric, _, kind = name.partition(",")
        known = [scores for scores in of_tasks if scores is not None]
        if len(known) == len(of_tasks):
            found[f"{metric},{kind or 'none'}"] = [score for scores in known for score in scores]
    return found
