"""How runs are named in tables and figures: short, and different where the runs differ."""

from collections.abc import Callable, Sequence

from slicing.experiment.comparison import dense_point, is_accuracy
from slicing.experiment.names import short_model_name, shown, text_name
from slicing.experiment.results import Point, Results
from slicing.report.seeds import seed_of
from slicing.report.settings import SETTINGS

TEXT_LABEL_LENGTH = 25  # characters of a text's name on an axis and in a table


def model_name(results: Results) -> str:
    """Last part of the hub name or path."""
    return short_model_name(results.model.name)


def is_sliced_model(results: Results) -> bool:
    """Whether the model of the run was a sliced one from the beginning: by its type, or, where it is saved as a plain
    checkpoint of its family, by what it lacks of the model that it was made from."""
    found = dense_point(results)
    return bool(results.model.model_type == "sliced" or (found is not None and found.cut != 0))


def text_label(results: Results) -> str:
    """Name and split of the text of the perplexity; the middle is left out where it is too long for an axis."""
    text = results.data.perplexity
    label = f"{text_name(text.source)} {text.split or ''}".strip()
    half = TEXT_LABEL_LENGTH // 2
    return label if len(label) <= TEXT_LABEL_LENGTH else f"{label[:half]}…{label[-half:]}"


def run_label(results: Results) -> str:
    """Model, mean, rotations, calibration and what else is not the paper's, for a legend; the model alone where nothing
    was sliced."""
    point = _sliced_point(results)
    if point is None:
        return model_name(results)
    inner = point.inner_mean
    mean = f"SP = {point.mean:g}" + (f", inner {inner:g}" if inner else "")
    if inner_alone(results):
        mean = f"inner SP = {inner:g}"
    return ", ".join([model_name(results), mean, *_how(results, point)])


def way_label(results: Results) -> str:
    """The same without the mean: what the runs of one curve over several means have in common."""
    point = _sliced_point(results)
    if point is None:
        return model_name(results)
    inner = [f"inner {point.inner_mean:g}"] if point.inner_mean else []
    return ", ".join(
        [model_name(results), *(["inner width"] if inner_alone(results) else inner), *_how(results, point)]
    )


def _sliced_point(results: Results) -> Point | None:
    return next((point for point in results.points if point.kind == "sweep"), None)


def inner_alone(results: Results) -> bool:
    """Whether the hidden size is left as it is, so that it has no rotations."""
    return bool(results.arguments.get("inner_mean")) and not results.arguments.get("mean")


def _how(results: Results, point: Point) -> list[str]:
    rotations = f"{point.rotations} rotation{'' if point.rotations == 1 else 's'}"
    calibrated = "calibrated once" if point.calibration == "once" else "calibrated at every point"
    more = ["gradient metric"] if point.metric == "gradient" else []
    more += ["refit"] if point.refit else []
    return [*([] if inner_alone(results) else [rotations]), calibrated, *more]


def run_labels(runs: Sequence[Results]) -> list[str]:
    """A label a run, all different: equal `run_label`s go on with what differs of text, seed, full name of the model,
    tasks and settings, else with a number."""
    marks = [text_label, _seed_label, lambda run: shown(run.model.name), _task_names]
    marks += [setting.label for setting in SETTINGS]
    return _told_apart([run_label(run) for run in runs], runs, marks)


def dense_labels(runs: Sequence[Results]) -> list[str]:
    """A label for the dense model of each run, all different in the same way; no seed changes these."""
    marks = (text_label, lambda run: shown(run.model.name), _task_names)
    kinds = ["sliced model" if is_sliced_model(run) else "dense" for run in runs]
    return _told_apart([f"{model_name(run)}, {kind}" for run, kind in zip(runs, kinds, strict=True)], runs, marks)


def _told_apart(labels: Sequence[str], runs: Sequence[Results], marks: Sequence[Callable[[Results], str]]) -> list[str]:
    """Labels that are all different: equal ones go on with each mark that differs between their runs, or a number."""
    told = list(labels)
    for label in set(labels):
        group = [i for i, other in enumerate(labels) if other == label]
        for mark in marks:
            texts = [mark(runs[i]) for i in group]
            if len(set(texts)) > 1:
                for i, text in zip(group, texts, strict=True):
                    told[i] += f", {text}"
    return [f"{one} ({told[:i].count(one) + 1})" if told.count(one) > 1 else one for i, one in enumerate(told)]


def _seed_label(results: Results) -> str:
    seed = seed_of(results)
    return "mean over seeds" if seed is None else f"seed {seed}"


def _task_names(results: Results) -> str:
    names = {name: None for point in results.points for name in point.tasks}
    return f"tasks: {', '.join(names)}" if names else "no tasks"


def accuracy_label(runs: Sequence[Results]) -> str:
    """What the mean accuracies of the runs are means of, for an axis."""
    found = [
        {name for point in run.points for name, score in point.tasks.items() if is_accuracy(score)} for run in runs
    ]
    tasks = [names for names in found if names]
    label = "accuracy" if all(len(names) == 1 for names in tasks) else "mean accuracy"
    if any(names != tasks[0] for names in tasks):
        return f"{label}\n(tasks differ between runs)"
    return label if label == "accuracy" else f"{label} of {len(tasks[0])} tasks"
