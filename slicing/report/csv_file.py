"""results.csv: all that the results say of each point, at full precision."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slicing.experiment.comparison import (
    Change,
    compare,
    constant_point,
    dense_point,
    mean_accuracy_change,
    mean_accuracy_error,
    score_change,
)
from slicing.experiment.results import PARTS, Point, Results
from slicing.families import InputError
from slicing.files import replacing
from slicing.report.columns import against_constant, mean_of
from slicing.report.labels import is_sliced_model
from slicing.report.seeds import PooledPoint, seed_of
from slicing.report.settings import SETTINGS
from slicing.report.speed_columns import speed_of


def write_csv(runs: Sequence[Results], file: str | Path) -> None:
    """A row a point at full precision; an empty cell where there is no number. Task columns: NAME, NAME_stderr."""
    names, rows = csv_rows(runs)
    how = "backslashreplace"  # a file's name may be no UTF-8
    with replacing(Path(file)) as partial, partial.open("w", newline="", encoding="utf-8", errors=how) as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)


def csv_lines(runs: Sequence[Results], chosen: Sequence[str] | None = None) -> list[str]:
    """The same as lines, of all columns or the chosen ones."""
    names, rows = csv_rows(runs)
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        raise InputError(f"there is no column {unknown[0]!r} in a CSV: the columns are {', '.join(names)}")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, chosen or names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().splitlines()


def csv_rows(runs: Sequence[Results]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, and a dictionary a row."""
    rows = [_csv_row(point, run) for run in runs for point in run.points]
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _csv_row(point: Point, results: Results) -> dict[str, Any]:
    text = results.data.perplexity
    row: dict[str, Any] = {"model": results.model.name, "revision": results.model.revision}
    row |= {"text": text.source, "split": text.split, "seed": seed_of(results)}
    row |= {setting.name: setting.value(results) for setting in SETTINGS}
    plain = ("key", "kind", "mean", "base", "amount", "rotations", "calibration", "parameters", "cut", "perplexity")
    row |= {key: getattr(point, key) for key in (*plain, "metric", "refit", "inner_mean", "inner_base")}
    if point.kind == "dense" and is_sliced_model(results):
        row["kind"] = "sliced model"
    row["change_dense"], row["paired_se_dense"] = compare(point, dense_point(results))
    row["change_constant"], row["paired_se_constant"] = against_constant(point, results)
    row |= {"mean_accuracy": point.mean_accuracy, "mean_accuracy_stderr": mean_accuracy_error(point)}
    row["mean_accuracy_of"] = "; ".join(mean_of([results])) or None
    row |= _changes("mean_accuracy", lambda reference: mean_accuracy_change(point, reference), results)
    if isinstance(point, PooledPoint):
        row |= {
            "seeds": point.seeds,
            "perplexity_sd": point.perplexity_sd,
            "mean_accuracy_sd": point.accuracy_sd,
        }
    for part in PARTS:
        row[f"seconds_{part}"] = getattr(point.seconds, part)
        row[f"peak_memory_bytes_{part}"] = getattr(point.peak_memory_bytes, part)
    row |= _speeds(point)
    for name, score in point.tasks.items():
        row |= {name: score.value, f"{name}_stderr": score.stderr, f"{name}_metric": score.metric}
        task = results.tasks.get(name)
        row |= {f"{name}_shots": task and task.shots, f"{name}_version": task and task.version}
        row |= {f"{name}_hash": task and task.content, f"{name}_documents": score.documents}
        row |= _changes(name, lambda reference, name=name: score_change(point, reference, name), results)  # type: ignore[misc]
    return row


def _speeds(point: Point) -> dict[str, Any]:
    """What was measured of a point's speed, and how; nothing without --speed."""
    if point.speed is None:
        return {}
    units = {"prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second", "memory": "memory_bytes"}
    row: dict[str, Any] = {}
    for name, column in units.items():
        row[f"speed_{column}"], row[f"speed_{name}_ratio"] = speed_of(point, name)
    return row | {f"speed_{name}": getattr(point.speed, name) for name in ("windows", "length", "cache_length")}


def _changes(name: str, change: Callable[[Point | None], Change], results: Results) -> dict[str, Any]:
    """Differences of an accuracy from the dense model and from constant slicing, with their paired standard errors."""
    row: dict[str, Any] = {}
    for reference, point in (("dense", dense_point(results)), ("constant", constant_point(results))):
        row[f"{name}_against_{reference}"], row[f"{name}_paired_se_{reference}"] = change(point)
    return row
