"""Accuracies of two models compared in pairs: both answered the same documents.

The error of the difference is that of its mean over the documents, 2 to 2.5 times smaller than from the errors of both.
"""

import math
from collections.abc import Sequence

from slicing.experiment.results import Point, is_accuracy, paired_standard_error
from slicing.task_scores import TaskScore, document_scores

Change = tuple[float | None, float | None]  # a difference, and its paired standard error


def score_change(point: Point, reference: Point | None, task: str) -> Change:
    """Difference of a task's scores; None where a point has none, or another metric. The error is None too where the
    scores of single documents are not known."""
    if reference is None or point is reference:
        return None, None
    ours, theirs = point["tasks"].get(task), reference["tasks"].get(task)
    if ours is None or theirs is None or ours["metric"] != theirs["metric"]:
        return None, None
    if ours["value"] is None or theirs["value"] is None:
        return None, None
    each = document_lists([ours, theirs])
    return ours["value"] - theirs["value"], None if each is None else paired_standard_error(*each)


def mean_accuracy_change(point: Point, reference: Point | None) -> Change:
    """Difference of the mean accuracies over the same tasks, whose documents are independent."""
    if reference is None or point is reference or point["mean_accuracy"] is None or reference["mean_accuracy"] is None:
        return None, None
    tasks = [name for name, score in point["tasks"].items() if is_accuracy(score)]
    if tasks != [name for name, score in reference["tasks"].items() if is_accuracy(score)]:
        return None, None
    errors = [score_change(point, reference, name)[1] for name in tasks]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(known) if known and len(known) == len(errors) else None
    return point["mean_accuracy"] - reference["mean_accuracy"], error


def document_lists(scores: Sequence[TaskScore]) -> list[list[float]] | None:
    """The scores of the same documents by several models; None where they are not known, or not of one length."""
    found = []
    for score in scores:
        metric = score["metrics"].get(score["metric"] or "")
        documents = None if metric is None else document_scores(metric)
        if documents is None:
            return None
        found.append(documents)
    return found if len(set(map(len, found))) == 1 else None
