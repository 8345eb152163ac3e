"""The columns of the table: what is in them, and which are shown unless others are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from slicing.experiment.comparison import (
    Change,
    compare,
    constant_point,
    dense_point,
    is_accuracy,
    mean_accuracy_change,
    mean_accuracy_error,
    score_change,
)
from slicing.experiment.names import shown
from slicing.experiment.results import PARTS, Part, Point, Results
from slicing.report.column import Cell, Column, optional
from slicing.report.labels import inner_alone, is_sliced_model, model_name, text_label
from slicing.report.seeds import PooledPoint, seed_of
from slicing.report.settings import SETTINGS, Setting, differing, shown_value
from slicing.report.speed_columns import speed_columns


def columns_for(runs: Sequence[Results], tasks: Sequence[str] | None = None, *, labelled: bool = False) -> list[Column]:
    """All columns of a table over the runs. `tasks`: names given beforehand; `labelled`: say which run a row is of, by
    all in which they differ."""
    if tasks is None:
        tasks = list(dict.fromkeys(name for run in runs for point in run.points for name in point.tasks))
    pooled = any(isinstance(point, PooledPoint) for run in runs for point in run.points)
    return [
        *_label_columns(runs, labelled),
        *_solving_columns(runs),
        Column("point", ("", "point"), -12 if any(map(is_sliced_model, runs)) else -10, kind),
        Column("SB", ("", "SB"), 5, lambda point, _: optional(point.base, ".3f")),
        Column("SP", ("", "SP"), 5, lambda point, _: optional(point.mean, ".3f")),
        *_inner_columns(runs),
        *([Column("seeds", ("", "seeds"), 5, _seeds)] if pooled else []),
        Column("perplexity", ("", "perplexity"), 10, lambda point, _: perplexity_text(point.perplexity)),
        *([Column("perplexity_sd", ("SD over", "seeds"), 7, _perplexity_sd)] if pooled else []),
        Column(
            "dense",
            ("against", "dense"),
            8,
            lambda point, run: change_text(compare(point, dense_point(run))[0]),
            rank=6,
        ),
        Column(
            "dense_se",
            ("paired", "SE(ln)"),
            6,
            lambda point, run: optional(compare(point, dense_point(run))[1], ".4f"),
            rank=8,
        ),
        Column(
            "constant",
            ("against", "constant"),
            8,
            lambda point, run: change_text(against_constant(point, run)[0]),
            rank=3,
        ),
        Column(
            "constant_se",
            ("paired", "SE(ln)"),
            6,
            lambda point, run: optional(against_constant(point, run)[1], ".4f"),
            rank=7,
        ),
        Column("parameters", ("para-", "meters"), 7, lambda point, _: millions(point.parameters)),
        Column("cut", ("true", "cut"), 6, lambda point, _: f"{point.cut:z.1%}", rank=4),
        *_task_columns(runs, tasks, pooled),
        *speed_columns(runs),
        Column("seconds", ("", "seconds"), 7, _seconds, rank=10),
        *(_part_columns()),
    ]


def _label_columns(runs: Sequence[Results], labelled: bool) -> list[Column]:
    names: dict[str, str] = {run.model.name: model_name(run) for run in runs}
    if len(set(names.values())) < len(names):
        names = {name: shown(name) for name in names}
    texts = {text_label(run) for run in runs}
    differ = differing(runs) if labelled else []
    columns = [
        Column("model", ("", "model"), -max(5, *map(len, names.values())), lambda _, run: names[run.model.name]),
        Column("text", ("", "text"), -max(map(len, texts), default=4), lambda _, run: text_label(run)),
        Column("seed", ("", "seed"), 5, lambda _, run: optional(seed_of(run), "d")),
        Column("rotations", ("rota-", "tions"), 5, _rotations, rank=2),
        Column("calibrated", ("", "calibrated"), -11, lambda point, _: point.calibration or "-", rank=2),
    ]
    seeds = len({seed_of(run) for run in runs}) > 1
    wanted = {"model": labelled, "text": labelled and len(texts) > 1, "seed": labelled and seeds}
    columns = [replace(column, shown=wanted.get(column.name, labelled)) for column in columns]
    return [*columns, *(_setting_column(setting, runs, setting in differ) for setting in SETTINGS)]


def _solving_columns(runs: Sequence[Results]) -> list[Column]:
    """How bases and writers were found, if that is not the paper's way somewhere."""
    gradient = any(run.arguments.get("metric") == "gradient" for run in runs)
    refit = any(run.arguments.get("refit") for run in runs)
    return [
        Column("metric", ("", "metric"), -8, lambda point, _: point.metric or "-", shown=gradient),
        Column("refit", ("", "refit"), -5, lambda point, _: "yes" if point.refit else "-", shown=refit),
    ]


def _inner_columns(runs: Sequence[Results]) -> list[Column]:
    """SB and SP of the inner widths, if a run cuts these."""
    cut = any(run.arguments.get("inner_mean") for run in runs)
    return [
        Column("inner_SB", ("inner", "SB"), 5, lambda point, _: optional(point.inner_base, ".3f"), shown=cut),
        Column("inner_SP", ("inner", "SP"), 5, lambda point, _: optional(point.inner_mean, ".3f"), shown=cut),
    ]


def _setting_column(setting: Setting, runs: Sequence[Results], is_shown: bool) -> Column:
    first, _, second = setting.name.replace("_", " ").rpartition(" ")
    width = max(len(first), len(second), *(len(shown_value(setting, run)) for run in runs))
    return Column(setting.name, (first, second), -width, lambda _, run: shown_value(setting, run), shown=is_shown)


def _task_columns(runs: Sequence[Results], tasks: Sequence[str], pooled: bool) -> list[Column]:
    """Scores, their mean, and the differences of both from the dense model and constant slicing; the single tasks'
    differences where they are asked for."""
    columns = []
    for name in tasks:
        title = measured_as(runs, name)
        width = max(15, len(name), len(title))
        columns.append(Column(name, (title, name), width, _task_cell(name), rank=5))
        for reference, find in _REFERENCES.items():
            cell = _change_cell(lambda point, run, name=name, find=find: score_change(point, find(run), name))  # type: ignore[misc]
            titles = (f"{title} against {reference}".strip(), name)
            columns.append(Column(f"{name}:{reference}", titles, max(map(len, titles)), cell, shown=False))
    if tasks:
        count = len(mean_of(runs)) or len(tasks)
        sliced = any(run.redundancy is not None for run in runs)
        mean_title = ("mean" if count == 1 else f"mean of {count}", "accuracy")
        columns.append(Column("accuracy", mean_title, 12, _mean_accuracy))
        if pooled:
            columns.append(Column("accuracy_sd", ("SD over", "seeds"), 7, _accuracy_sd))
        for reference, find in _REFERENCES.items():
            cell = _change_cell(lambda point, run, find=find: mean_accuracy_change(point, find(run)))  # type: ignore[misc]
            titles = ("accuracy", f"against {reference}")
            width = max(map(len, titles))
            columns.append(Column(f"accuracy:{reference}", titles, width, cell, shown=sliced, rank=1))
    return columns


def measured_as(runs: Sequence[Results], task: str) -> str:
    """Metric and shots of a task; "" where neither is known yet, "mixed" where they differ between the runs."""
    scores = [point.tasks[task] for run in runs for point in run.points if task in point.tasks]
    metrics = {score.metric for score in scores} - {None}
    counts = {run.tasks[task].shots for run in runs if task in run.tasks}
    words = [] if not metrics else [str(metrics.pop()) if len(metrics) == 1 else "mixed metrics"]
    if counts:
        count = counts.pop() if len(counts) == 1 else None
        words.append("mixed shots" if count is None else f"{count}-shot")
    return " ".join(words)


def mean_of(runs: Sequence[Results]) -> list[str]:
    """What the mean accuracy is a mean of: each task with metric, shots and documents."""
    found: dict[str, str] = {}
    for run in runs:
        for point in run.points:
            for name, score in point.tasks.items():
                if is_accuracy(score) and name not in found:
                    found[name] = f"{name} ({measured_as(runs, name)}, {score.documents} documents)"
    return list(found.values())


# ---- cells


def _constant_reference(run: Results) -> Point | None:
    return constant_point(run)


_REFERENCES: dict[str, Callable[[Results], Point | None]] = {"dense": dense_point, "constant": _constant_reference}


def change_text(value: float | None) -> str:
    return "-" if value is None else ">9999%" if value > 99.99 else f"{value:+z.1%}"


def perplexity_text(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.4g}"


def millions(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def kind(point: Point, results: Results) -> str:
    if point.kind == "dense" and is_sliced_model(results):
        return "sliced model"
    names = {"dense": "dense", "equal-parameters": "equal size", "confirm": "confirmed"}
    return names.get(point.kind) or ("constant" if point.amount == 0 else "dynamic")


def _with_error(value: float | None, error: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form) + ("" if error is None else f" ±{error:.3f}")


def _task_cell(name: str) -> Cell:
    def cell(point: Point, _: Results) -> str:
        score = point.tasks.get(name)
        return "-" if score is None else _with_error(score.value, score.stderr)

    return cell


def _change_cell(change: Callable[[Point, Results], Change]) -> Cell:
    """A difference of accuracies with its paired standard error; of the dense model none, as it is the reference."""

    def cell(point: Point, run: Results) -> str:
        return "-" if point.kind == "dense" else _with_error(*change(point, run), form="+z.3f")

    return cell


def _mean_accuracy(point: Point, _: Results) -> str:
    return _with_error(point.mean_accuracy, mean_accuracy_error(point))


def _rotations(point: Point, run: Results) -> str:
    return "-" if inner_alone(run) else optional(point.rotations, "d")


def _seconds(point: Point, _: Results) -> str:
    return f"{sum(getattr(point.seconds, part) or 0.0 for part in PARTS):.0f}"


def _part_columns() -> list[Column]:
    """Seconds and memory of each part."""

    def seconds(part: Part) -> Cell:
        return lambda point, _: optional(getattr(point.seconds, part), ".1f")

    def memory(part: Part) -> Cell:
        def cell(point: Point, _: Results) -> str:
            size = getattr(point.peak_memory_bytes, part)
            return "-" if size is None else f"{size / 1e9:.2f}"

        return cell

    columns = [Column(f"seconds_{part}", ("seconds", part), 10, seconds(part), shown=False) for part in PARTS]
    return columns + [Column(f"memory_{part}", ("peak GB", part), 10, memory(part), shown=False) for part in PARTS]


def _seeds(point: Point, _: Results) -> str:
    return str(point.seeds if isinstance(point, PooledPoint) else 1)


def _perplexity_sd(point: Point, _: Results) -> str:
    return optional(point.perplexity_sd if isinstance(point, PooledPoint) else None, ".3f")


def _accuracy_sd(point: Point, _: Results) -> str:
    return optional(point.accuracy_sd if isinstance(point, PooledPoint) else None, ".4f")


def against_constant(point: Point, results: Results) -> Change:
    """Change of perplexity against constant slicing, and its paired standard error; None of the dense model."""
    return (None, None) if point.kind == "dense" else compare(point, constant_point(results))
