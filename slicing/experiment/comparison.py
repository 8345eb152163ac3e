"""Points compared in pairs: perplexities over the same windows, accuracies over the same documents.

The error of a difference is that of its mean over the windows or documents: 2 to 2.5 times smaller than from the errors
of both accuracies, far smaller for perplexities.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from slicing.experiment.results import Point, Results
from slicing.task_scores import TaskScore, document_scores

Change = tuple[float | None, float | None]  # a difference, and its paired standard error

# ---- the points that others are compared with


def dense_point(results: Results) -> Point | None:
    """The dense model's point; None where it has not been made yet."""
    return next((point for point in results.points if point.kind == "dense"), None)


def constant_point(results: Results) -> Point | None:
    """Constant slicing (SB = SP) at the run's mean; None where it has not been made yet."""
    return next((point for point in results.points if point.kind == "sweep" and point.amount == 0), None)


def best_dynamic_point(results: Results, reference: Point | None) -> Point | None:
    """The dynamic point of lowest perplexity, of those with the rotations and the calibration of the reference."""
    points = [
        point
        for point in results.points
        if point.kind in ("sweep", "confirm")
        and (point.amount or 0) > 0
        and (reference is None or (point.rotations, point.calibration) == (reference.rotations, reference.calibration))
    ]
    return min(points, key=lambda point: point.perplexity, default=None)


# ---- perplexities


def compare(point: Point, reference: Point | None) -> Change:
    """Change of perplexity as a fraction, and its paired standard error in log perplexity; None without a reference."""
    if reference is None or point is reference:
        return None, None
    return point.perplexity / reference.perplexity - 1, paired_standard_error(point.nll, reference.nll)


def paired_standard_error(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Standard error of mean(values - reference), both (N,) of the same windows or documents; None for one of them."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


# ---- accuracies


def is_accuracy(score: TaskScore) -> bool:
    """Whether a task's score is an accuracy, by the metric's name."""
    return str(score.metric).startswith(("acc", "exact_match"))


def mean_accuracy(tasks: Mapping[str, TaskScore]) -> float | None:
    """Mean of the scores that are accuracies: a task's perplexity is not to be averaged. None where none is one, and
    where a score has no value: a mean over fewer tasks can't be compared with another point's."""
    known = {name: score.value for name, score in tasks.items() if score.value is not None}
    values = [value for name, value in known.items() if is_accuracy(tasks[name])]
    return statistics.fmean(values) if values and len(known) == len(tasks) else None


def mean_accuracy_error(point: Point) -> float | None:
    """Standard error of the mean over the tasks, whose documents are independent; None where there is no mean, or a
    task has none."""
    if mean_accuracy(point.tasks) is None:
        return None
    return _error_of_mean([score.stderr for score in point.tasks.values() if is_accuracy(score)])


def score_change(point: Point, reference: Point | None, task: str) -> Change:
    """Difference of a task's scores; None where a point has none, or another metric. The error is None too where the
    scores of single documents are not known."""
    if reference is None or point is reference:
        return None, None
    ours, theirs = point.tasks.get(task), reference.tasks.get(task)
    if ours is None or theirs is None or ours.metric != theirs.metric:
        return None, None
    if ours.value is None or theirs.value is None:
        return None, None
    each = document_lists([ours, theirs])
    return ours.value - theirs.value, None if each is None else paired_standard_error(*each)


def mean_accuracy_change(point: Point, reference: Point | None) -> Change:
    """Difference of the mean accuracies over the same tasks, whose documents are independent."""
    if reference is None or point is reference or point.mean_accuracy is None or reference.mean_accuracy is None:
        return None, None
    tasks = [name for name, score in point.tasks.items() if is_accuracy(score)]
    if tasks != [name for name, score in reference.tasks.items() if is_accuracy(score)]:
        return None, None
    error = _error_of_mean([score_change(point, reference, name)[1] for name in tasks])
    return point.mean_accuracy - reference.mean_accuracy, error


def document_lists(scores: Sequence[TaskScore]) -> list[list[float]] | None:
    """The scores of the same documents by several models; None where they are not known, or not of one length."""
    found = []
    for score in scores:
        metric = score.metrics.get(score.metric or "")
        documents = None if metric is None else document_scores(metric)
        if documents is None:
            return None
        found.append(documents)
    return found if len(set(map(len, found))) == 1 else None


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Of independent numbers with these errors; None where one is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None
