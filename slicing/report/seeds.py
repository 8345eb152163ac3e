"""Runs that differ by their seed alone, as one: means, and standard deviations over the calibrations."""

import json
import statistics
from collections.abc import Sequence

from msgspec.structs import asdict, replace

from slicing.experiment.comparison import document_lists
from slicing.experiment.results import Point, Results, Speed
from slicing.task_scores import Metric, TaskScore

# of the arguments: where results go, and what is shown of the work
_NO_SETTINGS = {"seed", "seeds", "output_dir", "fresh", "quiet", "cuda_device", "save_model", "compare", "batch_size"}
_NO_SETTINGS |= {"speed"}


class PooledPoint(Point, kw_only=True):
    """A point of several runs: means over the seeds, also of each window and document, so that differences between
    models keep their paired errors; and the spread of the single runs, None where it can't be had."""

    seeds: int
    perplexity_sd: float | None
    accuracy_sd: float | None


def seed_of(run: Results) -> int | None:
    """The seed of a run; None of several as one."""
    return None if any(isinstance(point, PooledPoint) for point in run.points) else run.seed


def pooled(runs: Sequence[Results]) -> list[Results]:
    """The runs, those that differ by their seed alone as one in the place of the first."""
    groups: dict[str, list[Results]] = {}
    for run in runs:
        groups.setdefault(_settings(run), []).append(run)
    found = []
    for group in groups.values():
        found += [_as_one(group)] if len({run.seed for run in group}) == len(group) > 1 else group
    return found


def _settings(run: Results) -> str:
    """All that makes two runs the same experiment, but for the seed."""
    arguments = {name: value for name, value in run.arguments.items() if name not in _NO_SETTINGS}
    text = run.data.perplexity
    return json.dumps(
        [
            run.model.name,
            run.model.dtype,
            arguments,
            [text.source, text.split, text.windows, text.length],
        ],
        sort_keys=True,
    )


def _as_one(runs: Sequence[Results]) -> Results:
    """Each point of the first run with the same one of the others; what some runs lack is a mean over the rest."""
    points = []
    of_runs = [{_place(run, i): point for i, point in enumerate(run.points)} for run in runs]
    for place in dict.fromkeys(place for found in of_runs for place in found):
        points.append(_mean([found[place] for found in of_runs if place in found]))
    return replace(runs[0], points=points)


def _place(run: Results, index: int) -> str:
    """What the same points of two runs have in common: extra ones, whose SP or SB is found, their kind."""
    point = run.points[index]
    return f"{point.kind} {point.amount:.6f}" if point.kind == "sweep" and point.amount is not None else point.kind


def _mean(points: Sequence[Point]) -> Point:
    """One point of several. A dense model whose tasks have no random examples is the same with every seed."""
    first = points[0]
    measured = [(point.nll, point.tasks) for point in points]
    if first.kind == "dense" and all(one == measured[0] for one in measured):
        return first
    accuracies = [point.mean_accuracy for point in points if point.mean_accuracy is not None]
    whole = len(accuracies) == len(points)
    means = {
        "mean": _average([point.mean for point in points]),
        "base": _average([point.base for point in points]),
        "parameters": round(statistics.fmean(point.parameters for point in points)),
        "cut": statistics.fmean(point.cut for point in points),
        "perplexity": statistics.fmean(point.perplexity for point in points),
        "nll": [statistics.fmean(values) for values in zip(*(point.nll for point in points), strict=True)],
        "tasks": {
            name: _mean_score([point.tasks[name] for point in points if name in point.tasks]) for name in first.tasks
        },
        "mean_accuracy": statistics.fmean(accuracies) if whole else None,
        "speed": _mean_speed([point.speed for point in points]),
    }
    return PooledPoint(
        **(asdict(first) | means),
        seeds=len(points),
        perplexity_sd=_deviation([point.perplexity for point in points]),
        accuracy_sd=_deviation(accuracies) if whole else None,
    )


def _mean_score(scores: Sequence[TaskScore]) -> TaskScore:
    """A task's mean score. Its standard error over the documents is the mean of those of the runs: they share them."""
    first = scores[0]
    value = _average([score.value for score in scores])
    stderr = _average([score.stderr for score in scores])
    metrics = dict(first.metrics)
    if first.metric in metrics:
        each = document_lists(scores)
        means = None if each is None else [statistics.fmean(of_one) for of_one in zip(*each, strict=True)]
        metrics[first.metric] = Metric(value, stderr, means)
    return replace(first, value=value, stderr=stderr, metrics=metrics)


def _mean_speed(speeds: Sequence[Speed | None]) -> Speed | None:
    """None where one run lacks it. Widths depend on no seed, and so does no memory."""
    known = [speed for speed in speeds if speed is not None]
    if not known or len(known) < len(speeds):
        return None
    names = ("prefill", "dense_prefill", "decode", "dense_decode")
    return replace(known[0], **{name: _average([getattr(one, name) for one in known]) for name in names})


def _average(values: Sequence[float | None]) -> float | None:
    """None where one is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None
