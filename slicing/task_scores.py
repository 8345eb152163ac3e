"""Scores of lm-eval tasks and groups, read from what lm-eval gives: what can't be had is None, with the reason.

Scores of single documents come with them, so that two models can be compared in pairs.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from slicing.task_set import Loaded, reason_of


class Metric(TypedDict):
    """One metric of a task. value is None where it is no finite number, stderr where lm-eval has none.

    documents: of a metric that is the mean over the documents, the score of each, in their order: a string of digits
        where each is 0 or 1, which takes a tenth of the room, else a list.
    """

    value: float | None
    stderr: float | None
    documents: NotRequired[str | list[float]]


class TaskScore(TypedDict):
    """Result of one task or group, ready for JSON.

    metric: the metric that stands for the task: acc_norm where there is one, else acc, else the task's first; None
        where lm-eval gives none.
    value, stderr: of that metric; None where there is none, or no finite number.
    reason: why there is no value; None where there is one.
    documents: how many were evaluated.
    metrics: every metric of the task by name.
    subtasks: of a group, the value of its metric (of each task's own, where the group has none) for each task in it.
    """

    metric: str | None
    value: float | None
    stderr: float | None
    reason: str | None
    documents: int
    metrics: dict[str, Metric]
    subtasks: NotRequired[dict[str, float | None]]


def no_score(reason: str, documents: int = 0) -> TaskScore:
    return {"metric": None, "value": None, "stderr": None, "reason": reason, "documents": documents, "metrics": {}}


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
        metrics[name] = {"value": _number(value), "stderr": _number(result.get(f"{metric}_stderr,{kind}"))}
        said[name] = value
        each = _of_documents((documents_of or {}).get(key, ()), metrics[name]["value"])
        if each is not None:
            metrics[name]["documents"] = each
    documents = int(result.get("sample_len", 0))
    if not metrics:
        return no_score("lm-eval gives no metric for it", documents)
    chosen = next((metric for metric in ("acc_norm", "acc") if metric in metrics), next(iter(metrics)))
    value = metrics[chosen]["value"]
    return {
        "metric": chosen,
        "value": value,
        "stderr": metrics[chosen]["stderr"],
        "reason": None if value is not None else f"{chosen} is {str(said[chosen])[:40]}, no finite number",
        "documents": documents,
        "metrics": metrics,
    }


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
    kept = metric.get("documents")
    return None if kept is None else [float(score) for score in kept]


def group_score(loaded: Loaded, name: str, scores: dict[str, TaskScore]) -> TaskScore:
    """A group's aggregate of its tasks' scores; where a task has none, neither has the group."""
    leaves = {leaf: scores[leaf] for leaf in loaded.leaves(name)}
    failed = {leaf: score["reason"] for leaf, score in leaves.items() if score["value"] is None}
    documents = sum(score["documents"] for score in leaves.values())
    if failed:
        leaf, reason = next(iter(failed.items()))
        score = no_score(f"{len(failed)} of its {len(leaves)} tasks have no score; {leaf}: {reason}", documents)
    else:
        try:
            flat = loaded.groups[name].aggregate({leaf: _flat(score) for leaf, score in leaves.items()})
            score = task_score(flat, _of_members(leaves.values()))
        except Exception as error:  # what is aggregated is the tasks' own
            score = no_score(reason_of(error), documents)
        if score["metric"] is None and score["reason"] is not None:
            score["reason"] = "its tasks have none of the metrics that it aggregates"
    metric = score["metric"]
    score["subtasks"] = {
        leaf: part["value"] if metric is None else part["metrics"][metric]["value"]
        for leaf, part in leaves.items()
        if metric is None or metric in part["metrics"]
    }
    return score


def _flat(score: TaskScore) -> dict[str, Any]:
    """A score as lm-eval has it, which `task_score` read."""
    flat: dict[str, Any] = {"sample_len": score["documents"]}
    for key, metric in score["metrics"].items():
        name, _, kind = key.partition(",")
        flat[f"{name},{kind or 'none'}"] = metric["value"]
        flat[f"{name}_stderr,{kind or 'none'}"] = "N/A" if metric["stderr"] is None else metric["stderr"]
    return flat


def _of_members(scores: Iterable[TaskScore]) -> dict[str, list[float]]:
    """Scores of the documents of several tasks one after another, by lm-eval's keys, as far as all tasks have them: a
    group that weighs its tasks by size, as MMLU does, has their mean."""
    found: dict[str, list[float]] = {}
    every = [score["metrics"] for score in scores]
    for name in set.intersection(*map(set, every)):
        of_tasks = [document_scores(metrics[name]) for metrics in every]
        metric, _, kind = name.partition(",")
        known = [scores for scores in of_tasks if scores is not None]
        if len(known) == len(of_tasks):
            found[f"{metric},{kind or 'none'}"] = [score for scores in known for score in scores]
    return found
