"""What results.json holds, key by key, how it is read again, and how its points are compared.

`RESULTS_SCHEMA` is the documentation and what `check_results` goes by: a key that isn't in it is an error.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slicing.families import InputError
from slicing.files import read_json

Results = dict[str, Any]  # a results.json
Point = dict[str, Any]  # one of its points

SCHEMA_VERSION = 3  # 2 had no reason of a task's score, and a value for each: read as 3
KINDS = ("dense", "sweep", "equal-parameters", "confirm")
_TEXT = {
    "source": ("str", "data set, text file or demo"),
    "split": ("str or null", "part of the data set"),
    "windows": ("int", "number of windows N"),
    "length": ("int", "tokens a window S"),
    "tokens": ("int", "N * S"),
}
PARTS = ("slice", "perplexity", "tasks")  # of the work on a point
# Every key of results.json: its type and what it holds. A list's items and an object's free names (*) follow it.
RESULTS_SCHEMA: dict[str, tuple[str, str]] = {
    "schema_version": ("int", f"{SCHEMA_VERSION}"),
    "arguments": ("object", "the options of the run, as given"),
    "model": ("object", "the dense model"),
    "model.name": ("str", "hub name, folder, .gguf file or demo"),
    "model.revision": ("str or null", "commit on the hub"),
    "model.model_type": ("str", "family, as in config.json"),
    "model.dtype": ("str", "dtype of the weights"),
    "model.parameters": ("int", "unique parameters"),
    "model.hidden_size": ("int", "D"),
    "model.layers": ("int", "decoder layers L"),
    "model.tied": ("bool", "whether the head is the embedding table"),
    "versions": ("object", "of what the numbers depend on"),
    "versions.python": ("str", ""),
    "versions.torch": ("str", ""),
    "versions.transformers": ("str", ""),
    "versions.lm_eval": ("str or null", "null where no task was evaluated"),
    "git": ("str or null", "commit of this repository that wrote the file last, -dirty where files differed from it"),
    "device": ("str", "name of the card, or cpu"),
    "seed": ("int", "of the calibration windows and the examples in prompts"),
    "data": ("object", "the text"),
    "data.calibration": ("object or null", "windows that the bases come from"),
    **{f"data.calibration.{key}": entry for key, entry in _TEXT.items()},
    "data.perplexity": ("object", "windows of the perplexity"),
    **{f"data.perplexity.{key}": entry for key, entry in _TEXT.items()},
    "data.redundancy": ("object or null", "windows of LR; null where the vector was given as numbers"),
    **{f"data.redundancy.{key}": entry for key, entry in _TEXT.items()},
    "redundancy": ("object or null", "layer redundancy; null where nothing is sliced"),
    "redundancy.normalised": ("numbers", "LR of each layer (L)"),
    "redundancy.cosine": ("numbers or null", "mean cosine similarity before normalisation (L)"),
    "redundancy.stderr": ("numbers or null", "standard error of the cosine over the windows (L)"),
    "search": ("object or null", "of --find-base: where the lowest perplexity was looked for, and found"),
    "search.base": ("number", "SB with the lowest perplexity"),
    "search.data": ("object", "windows of the search"),
    **{f"search.data.{key}": entry for key, entry in _TEXT.items()},
    "search.trials": ("objects", "each slice base that was tried"),
    "search.trials.base": ("number", "SB"),
    "search.trials.perplexity": ("number", "with the bases of the dense model (calibration once)"),
    "tasks": ("object or absent", "what was asked of each task or group, by its name"),
    "tasks.*": ("object", ""),
    "tasks.*.version": ("str or null", "lm-eval's version of it"),
    "tasks.*.content": ("str", "hash of its documents, settings and functions"),
    "tasks.*.shots": ("int or null", "examples in the prompt; null of a group whose tasks differ"),
    "points": ("objects", "dense, constant slicing, the amounts up to the mean, then the extra kinds"),
    "points.key": ("str", "name of the point's file"),
    "points.git": ("str or null", "commit of this repository that measured the point"),
    "points.kind": ("str", " | ".join(KINDS)),
    "points.mean": (
        "number or null",
        "SP, of the inner widths where only they are cut; null for the dense model, as are the next six",
    ),
    "points.base": ("number or null", "SB"),
    "points.amount": ("number or null", "SP - SB; 0 is constant slicing"),
    "points.slices": ("numbers or null", "FS of each layer (L)"),
    "points.widths": ("ints or null", "width of each layer (L)"),
    "points.rotations": ("int or null", "bases a layer, 1 or 2"),
    "points.metric": ("str or null or absent", "of the bases: pca | gradient; points from before it are pca"),
    "points.refit": ("bool or null or absent", "whether the writers were solved anew"),
    "points.inner_mean": ("number or null or absent", "SP of the MLPs' inner widths; null where these are not cut"),
    "points.inner_base": ("number or null or absent", "SB of the inner widths"),
    "points.inner_widths": ("ints or null or absent", "inner width of each layer (L)"),
    "points.calibration": ("str or null", "every-point | once"),
    "points.parameters": ("int", "unique parameters, shortcuts and head included"),
    "points.cut": ("number", "1 - parameters / those of the dense model"),
    "points.perplexity": ("number", "exp of the mean of nll"),
    "points.nll": ("numbers", "mean negative log likelihood of a token, in nats, for each window (N)"),
    "points.tasks": ("object", "scores by task name; {} where there are none"),
    "points.tasks.*": ("object", "a score; further keys are lm-eval's own"),
    "points.tasks.*.metric": ("str or null", "metric that stands for the task; null where lm-eval gives none"),
    "points.tasks.*.value": ("number or null", "its value; null where it can't be had"),
    "points.tasks.*.reason": ("str or null", "why there is no value; null where there is one"),
    "points.tasks.*.stderr": ("number or null", "its standard error"),
    "points.tasks.*.documents": ("int", "documents evaluated"),
    "points.tasks.*.metrics": ("object or absent", "every metric by name"),
    "points.tasks.*.metrics.*": ("object", "its value, stderr and, where it is the mean over the documents, documents"),
    "points.tasks.*.metrics.*.documents": (
        "scores or absent",
        "the score of each document: a string of the digits 0 and 1, or a list of numbers",
    ),
    "points.mean_accuracy": (
        "number or null",
        "mean of the values that are accuracies; null where none is, or a score has no value",
    ),
    "points.seconds": ("object", "wall time by part"),
    **{f"points.seconds.{part}": ("number or null", "null where the part was not run") for part in PARTS},
    "points.peak_memory_bytes": ("object", "highest memory by part, on one card; of the process so far on a CPU"),
    **{f"points.peak_memory_bytes.{part}": ("number or null", "null where unknown") for part in PARTS},
}
_ABSENT = " or absent"  # keys that points of earlier versions lack
_OPEN = ("arguments", "points.tasks.*", "points.tasks.*.metrics.*")  # objects with further keys of any name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "number": _is_number,
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "ints": lambda value: isinstance(value, list) and all(map(_is_int, value)),
    "numbers": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "objects": lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    "scores": lambda value: set(value) <= {"0", "1"} if isinstance(value, str) else _TYPES["numbers"](value),
}


def check_results(results: Results) -> None:
    """Raise InputError, naming the key, unless `results` is what RESULTS_SCHEMA describes, without further keys.

    Lists must have a value a layer or a window, and points a known kind.
    """
    if not isinstance(results, dict):
        raise InputError(f"results are of type {type(results).__name__}: they must be a JSON object")
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"schema_version is {version!r}, known are 2 and {SCHEMA_VERSION}: read it with the code that wrote it"
        )
    _check_object(results, "", "")

    layers, windows = results["model"]["layers"], results["data"]["perplexity"]["windows"]
    lists = [("redundancy.normalised", (results["redundancy"] or {}).get("normalised"), layers)]
    for i, point in enumerate(results["points"]):
        if point["kind"] not in KINDS:
            raise InputError(f"points[{i}].kind is {point['kind']!r}: it must be one of {', '.join(KINDS)}")
        lists += [(f"points[{i}].{key}", point.get(key), layers) for key in ("slices", "widths", "inner_widths")]
        lists += [(f"points[{i}].nll", point["nll"], windows)]
    for label, values, length in lists:
        if values is not None and len(values) != length:
            raise InputError(f"{label} has {len(values)} values: there must be {length}")


def check_point(point: Point, key: str) -> None:
    """InputError, which names the key, unless this is a point as RESULTS_SCHEMA describes it, with this key."""
    if not isinstance(point, dict):
        raise InputError(f"a point is of type {type(point).__name__}: it must be a JSON object")
    _check_object(point, "points", "point")
    if point["key"] != key:
        raise InputError(f"point.key is {point['key']!r}: it must be {key!r}")


def check_redundancy(redundancy: dict[str, Any], data: object) -> None:
    """InputError, which names the key, unless these are the keys `redundancy` and `data.redundancy` of RESULTS_SCHEMA,
    with a value a layer in each vector."""
    _check_object(redundancy, "redundancy", "redundancy")
    _check_value(data, "data.redundancy", "data")
    for name, values in redundancy.items():
        if values is not None and len(values) != len(redundancy["normalised"]):
            raise InputError(f"{name} has {len(values)} values, normalised {len(redundancy['normalised'])}")


def _check_object(value: dict[str, Any], key: str, label: str) -> None:
    """`key` is the object's name in the schema, `label` its place in the results: points.seconds, points[3].seconds."""
    children = {child.rpartition(".")[2] for child in RESULTS_SCHEMA if child.rpartition(".")[0] == key}
    for name in sorted(children - {"*"} - value.keys()):
        if RESULTS_SCHEMA[f"{key}.{name}".lstrip(".")][0].endswith(_ABSENT):
            continue
        raise InputError(f"{label}.{name} is missing".lstrip("."))
    for name, item in value.items():
        place = f"{label}.{name}".lstrip(".")
        if name in children or "*" in children:
            _check_value(item, f"{key}.{name if name in children else '*'}".lstrip("."), place)
        elif key not in _OPEN:
            raise InputError(f"{place} is not a key of schema {SCHEMA_VERSION}")


def _check_value(value: object, key: str, label: str) -> None:
    kind = RESULTS_SCHEMA[key][0].removesuffix(_ABSENT)
    if value is None and kind.endswith(" or null"):
        return
    if not _TYPES[kind.removesuffix(" or null")](value):
        raise InputError(f"{label} is {str(value)[:40]!r} of type {type(value).__name__}: it must be {kind}")
    if isinstance(value, dict):
        _check_object(value, key, label)
    elif kind == "objects" and isinstance(value, list):
        for i, item in enumerate(value):
            _check_object(item, key, f"{label}[{i}]")


def read_results(folder: str | Path) -> Results:
    """The results.json of a run's folder. InputError where it is missing, damaged or not what the schema describes."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise InputError(f"there is no {path}: give the folder of a run")
    try:
        results: Results = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: the same experiment run again writes it anew") from error
    try:
        _upgrade(results)
        check_results(results)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return results


def _upgrade(results: Any) -> None:
    """Turn results of schema 2 into those of today's; what is damaged is left to `check_results`."""
    if not isinstance(results, dict) or results.get("schema_version") != 2:
        return
    results["schema_version"] = SCHEMA_VERSION
    points = results.get("points")
    for point in points if isinstance(points, list) else []:
        tasks = point.get("tasks") if isinstance(point, dict) else None
        for score in tasks.values() if isinstance(tasks, dict) else []:
            if isinstance(score, dict):
                score.setdefault("reason", None)


def paired_standard_error(nll: Sequence[float], reference: Sequence[float]) -> float | None:
    """Standard error of mean(nll - reference), both (N,) over the same windows; None for one window."""
    differences = [a - b for a, b in zip(nll, reference, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def dense_point(results: Results) -> Point | None:
    """The dense model's point; None where it has not been made yet."""
    return next((point for point in results["points"] if point["kind"] == "dense"), None)


def constant_point(results: Results) -> Point | None:
    """Constant slicing (SB = SP) at the run's mean; None where it has not been made yet."""
    return next((point for point in results["points"] if point["kind"] == "sweep" and point["amount"] == 0), None)


def best_dynamic_point(results: Results, reference: Point | None) -> Point | None:
    """The dynamic point of lowest perplexity, of those with the rotations and the calibration of the reference."""
    points = [
        point
        for point in results["points"]
        if point["kind"] in ("sweep", "confirm")
        and point["amount"] > 0
        and (reference is None or all(point[key] == reference[key] for key in ("rotations", "calibration")))
    ]
    return min(points, key=lambda point: point["perplexity"], default=None)


def compare(point: Point, reference: Point | None) -> tuple[float | None, float | None]:
    """Change of perplexity as a fraction, and its paired standard error in log perplexity; None without a reference."""
    if reference is None or point is reference:
        return None, None
    return point["perplexity"] / reference["perplexity"] - 1, paired_standard_error(point["nll"], reference["nll"])


def mean_accuracy(tasks: dict[str, Any]) -> float | None:
    """Mean of the scores that are accuracies: a task's perplexity is not to be averaged. None where none is one, and
    where a score has no value: a mean over fewer tasks can't be compared with another point's."""
    if any(score["value"] is None for score in tasks.values()):
        return None
    values = [score["value"] for score in tasks.values() if is_accuracy(score)]
    return statistics.fmean(values) if values else None


def mean_accuracy_error(point: Point) -> float | None:
    """Standard error of the mean over the tasks, whose documents are independent; None where there is no mean, or a
    task has none."""
    if mean_accuracy(point["tasks"]) is None:
        return None
    errors = [score["stderr"] for score in point["tasks"].values() if is_accuracy(score)]
    if not errors or None in errors:
        return None
    return math.hypot(*errors) / len(errors)


def is_accuracy(score: dict[str, Any]) -> bool:
    """Whether a task's score is an accuracy, by the metric's name."""
    return str(score["metric"]).startswith(("acc", "exact_match"))
