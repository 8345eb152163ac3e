"""Table and plots of finished runs: `python -m slicing.report FOLDER [FOLDER ...]` makes them again.

The table has a row a point. Changes of perplexity are in percent, against the dense model and against constant slicing
(SB = SP). Beside each is the paired standard error of the difference in log perplexity: both models read the same
windows, so the error of the difference is far smaller than that of either perplexity.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicing.command_line import Parser, Screen, exit_code, path
from slicing.experiment.names import shown
from slicing.experiment.results import (
    PARTS,
    Point,
    Results,
    best_dynamic_point,
    compare,
    constant_point,
    dense_point,
    mean_accuracy_error,
    paired_standard_error,
    read_results,
)
from slicing.families import InputError
from slicing.files import replacing
from slicing.report.labels import is_sliced_model, model_name, run_labels, text_label
from slicing.report.plots import plot_redundancy, plot_sweep

SIZE_TOLERANCE = 5e-4  # models whose parameter counts differ by less are of equal size


def equal_size_summary(results: Results) -> list[str]:
    """Lines on the best dynamic point against constant slicing, as it is and at an equal parameter count."""
    constant = constant_point(results)
    best = best_dynamic_point(results, constant) if constant else None
    if constant is None:
        return []
    if best is None:
        return ["The search found no slice base better than constant slicing."] if results["search"] else []
    lines = [f"Best dynamic point: SB {best['base']:.3f}. {_against('constant slicing', best, constant)}"]
    equal = next((point for point in results["points"] if point["kind"] == "equal-parameters"), None)
    size = best["parameters"] / constant["parameters"] - 1
    if equal is not None:
        name = f"constant slicing of mean {equal['mean']:.4f}"
        lines.append(f"At equal size: {_against(name, best, equal)}")
        gain = math.log(constant["perplexity"] / best["perplexity"])
        left = math.log(equal["perplexity"] / best["perplexity"])
        if not (_can_be_told(best, constant) and _can_be_told(best, equal)):
            lines.append(
                "No share of a gain is given: a difference within two paired standard errors can't be told from none."
            )
        elif gain > 0:
            lines.append(f"At equal size {left / gain:.0%} of the gain in log perplexity is left.")
        else:
            lines.append("There is no gain of which a part could be left at equal size.")
    elif abs(size) < SIZE_TOLERANCE:
        lines.append("Both have the same number of parameters, so this is a comparison at equal size.")
    else:
        lines.append(
            f"The dynamic model has {abs(size):.1%} {'more' if size > 0 else 'fewer'} parameters than the constant one:"
            " --compare equal-parameters shows what is left of the difference at equal size."
        )
    return lines


def _can_be_told(point: Point, reference: Point) -> bool:
    """Whether the difference in log perplexity is more than two of its standard errors, or these are not known."""
    error = paired_standard_error(point["nll"], reference["nll"])
    return error is None or abs(math.log(point["perplexity"] / reference["perplexity"])) > 2 * error


def _against(name: str, point: Point, reference: Point) -> str:
    change, error = compare(point, reference)
    paired = "" if error is None else f", paired SE {error:.4f} in log perplexity"
    if not _can_be_told(point, reference):
        paired += ": no difference can be told"
    return (
        f"Perplexity {_perplexity(point['perplexity'])} with {_millions(point['parameters'])} parameters against"
        f" {_perplexity(reference['perplexity'])} with {_millions(reference['parameters'])} for {name}"
        f" ({_change(change)}{paired})."
    )


# ---- table


@dataclass(frozen=True)
class _Column:
    """A column of the table: two lines of title, width in characters, and the cell of a point."""

    titles: tuple[str, str]
    width: int
    cell: Callable[[Point, Results], str]

    def pad(self, text: str) -> str:
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _change(value: float | None) -> str:
    return "-" if value is None else ">9999%" if value > 99.99 else f"{value:+z.1%}"


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.4g}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _kind(point: Point, results: Results) -> str:
    if point["kind"] == "dense" and is_sliced_model(results):
        return "sliced model"
    names = {"dense": "dense", "equal-parameters": "equal size", "confirm": "confirmed"}
    return names.get(point["kind"]) or ("constant" if point["amount"] == 0 else "dynamic")


def _score(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _task_cell(name: str) -> Callable[[Point, Results], str]:
    def cell(point: Point, _: Results) -> str:
        score = point["tasks"].get(name)
        return "-" if score is None else _score(score["value"], score["stderr"])

    return cell


def _seconds(point: Point) -> str:
    return f"{sum(value for value in point['seconds'].values() if value is not None):.0f}"


def _columns(runs: Sequence[Results], tasks: Sequence[str] | None, labelled: bool) -> list[_Column]:
    """Columns of a table over the runs. `tasks`: names given beforehand; `labelled`: say which run a row is of, by its
    text and seed too where they differ."""
    if tasks is None:
        tasks = list(dict.fromkeys(name for run in runs for point in run["points"] for name in point["tasks"]))
    columns = []
    if labelled:
        names: dict[str, str] = {run["model"]["name"]: model_name(run) for run in runs}
        if len(set(names.values())) < len(names):
            names = {name: shown(name) for name in names}
        columns.append(
            _Column(("", "model"), -max(5, *map(len, names.values())), lambda _, run: names[run["model"]["name"]])
        )
        texts = {text_label(run) for run in runs}
        if len(texts) > 1:
            columns.append(_Column(("", "text"), -max(map(len, texts)), lambda _, run: text_label(run)))
        if len({run["seed"] for run in runs}) > 1:
            columns.append(_Column(("", "seed"), 5, lambda _, run: str(run["seed"])))
        columns += [
            _Column(("rota-", "tions"), 5, lambda point, _: str(point["rotations"] or "-")),
            _Column(("", "calibrated"), -11, lambda point, _: point["calibration"] or "-"),
        ]
    if any(run["arguments"].get("metric") == "gradient" for run in runs):
        columns.append(_Column(("", "metric"), -8, lambda point, _: point.get("metric") or "-"))
    if any(run["arguments"].get("refit") for run in runs):
        columns.append(_Column(("", "refit"), -5, lambda point, _: "yes" if point.get("refit") else "-"))
    columns += [
        _Column(("", "point"), -12 if any(map(is_sliced_model, runs)) else -10, _kind),
        _Column(("", "SB"), 5, lambda point, _: _optional(point["base"], ".3f")),
        _Column(("", "SP"), 5, lambda point, _: _optional(point["mean"], ".3f")),
        *_inner_columns(runs),
        _Column(("", "perplexity"), 10, lambda point, _: _perplexity(point["perplexity"])),
        _Column(("against", "dense"), 8, lambda point, run: _change(compare(point, dense_point(run))[0])),
        _Column(("paired", "SE(ln)"), 6, lambda point, run: _optional(compare(point, dense_point(run))[1], ".4f")),
        _Column(("against", "constant"), 8, lambda point, run: _change(_against_constant(point, run)[0])),
        _Column(("paired", "SE(ln)"), 6, lambda point, run: _optional(_against_constant(point, run)[1], ".4f")),
        _Column(("para-", "meters"), 7, lambda point, _: _millions(point["parameters"])),
        _Column(("true", "cut"), 6, lambda point, _: f"{point['cut']:z.1%}"),
    ]
    columns += [_Column(("", name), max(12, len(name)), _task_cell(name)) for name in tasks]
    if tasks:
        columns.append(
            _Column(
                ("mean", "accuracy"), 12, lambda point, _: _score(point["mean_accuracy"], mean_accuracy_error(point))
            )
        )
    return [*columns, _Column(("", "seconds"), 7, lambda point, _: _seconds(point))]


def _inner_columns(runs: Sequence[Results]) -> list[_Column]:
    """SB and SP of the inner widths, where a run cuts these."""
    if not any(run["arguments"].get("inner_mean") for run in runs):
        return []
    return [
        _Column(("inner", "SB"), 5, lambda point, _: _optional(point.get("inner_base"), ".3f")),
        _Column(("inner", "SP"), 5, lambda point, _: _optional(point.get("inner_mean"), ".3f")),
    ]


def _against_constant(point: Point, results: Results) -> tuple[float | None, float | None]:
    return (None, None) if point["kind"] == "dense" else compare(point, constant_point(results))


def header(results: Results, *, tasks: Sequence[str] | None = None) -> str:
    """Three lines above the rows. `tasks`: names of the task columns; None takes those of the points in `results`."""
    return _header(_columns([results], tasks, labelled=False))


def format_row(point: Point, results: Results, *, tasks: Sequence[str] | None = None) -> str:
    """One line of fixed width. `results` holds the points to compare with; where one is missing the cell is a dash."""
    return _row(_columns([results], tasks, labelled=False), point, results)


def format_table(runs: Sequence[Results]) -> list[str]:
    """Lines of the table of one run or several; of several each row says model, rotations and calibration."""
    columns = _columns(runs, None, labelled=len(runs) > 1)
    return [_header(columns), *(_row(columns, point, run) for run in runs for point in run["points"])]


def _header(columns: Sequence[_Column]) -> str:
    lines = ["  ".join(column.pad(column.titles[i]) for column in columns).rstrip() for i in (0, 1)]
    return "\n".join([*lines, "-" * max(map(len, lines))])


def _row(columns: Sequence[_Column], point: Point, results: Results) -> str:
    return "  ".join(column.pad(column.cell(point, results)) for column in columns).rstrip()


def write_csv(runs: Sequence[Results], file: str | Path) -> None:
    """A row a point at full precision; an empty cell where there is no number. Task columns: NAME, NAME_stderr."""
    rows = [_csv_row(point, run) for run in runs for point in run["points"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    how = "backslashreplace"  # a file's name may be no UTF-8
    with replacing(Path(file)) as partial, partial.open("w", newline="", encoding="utf-8", errors=how) as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(point: Point, results: Results) -> dict[str, Any]:
    text = results["data"]["perplexity"]
    row: dict[str, Any] = {"model": results["model"]["name"], "revision": results["model"]["revision"]}
    row |= {"text": text["source"], "split": text["split"], "window_length": text["length"], "seed": results["seed"]}
    plain = ("key", "kind", "mean", "base", "amount", "rotations", "calibration", "parameters", "cut", "perplexity")
    row |= {key: point[key] for key in plain}
    row |= {key: point.get(key) for key in ("metric", "refit", "inner_mean", "inner_base")}
    if point["kind"] == "dense" and is_sliced_model(results):
        row["kind"] = "sliced model"
    row["change_dense"], row["paired_se_dense"] = compare(point, dense_point(results))
    row["change_constant"], row["paired_se_constant"] = _against_constant(point, results)
    row |= {"mean_accuracy": point["mean_accuracy"], "mean_accuracy_stderr": mean_accuracy_error(point)}
    for part in PARTS:
        row[f"seconds_{part}"] = point["seconds"][part]
        row[f"peak_memory_bytes_{part}"] = point["peak_memory_bytes"][part]
    for name, score in point["tasks"].items():
        row |= {name: score["value"], f"{name}_stderr": score["stderr"]}
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """The command: table and summary to stdout, results.csv and the plots into a folder. Returns the exit code."""
    parser = Parser("Tabulate and draw finished runs again.")
    parser.prog = "python -m slicing.report"
    parser.add_argument(
        "folders", nargs="+", type=path, metavar="FOLDER", help="folder of a run, with its results.json"
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="FOLDER",
        help="where results.csv, sweep.png (where something was sliced) and redundancy.png (for one run) go; default:"
        " the run's folder, for several runs the folder that holds the first",
    )
    options = parser.parse_args(argv)
    return exit_code(lambda: _report(options.folders, options.output), "interrupted")


def _report(folders: Sequence[str], output: str | None) -> None:
    runs = [read_results(folder) for folder in folders]
    screen = Screen()
    for line in format_table(runs):
        screen.show(line)
    for run, label in zip(runs, run_labels(runs), strict=True):
        for line in equal_size_summary(run):
            screen.show(line if len(runs) == 1 else f"{label}: {line}")
    first = Path(folders[0])
    write_files(runs, Path(output) if output else first if len(runs) == 1 else first.resolve().parent)
    screen.close()


def write_files(runs: Sequence[Results], folder: Path) -> None:
    """Write results.csv; where something was sliced, sweep.png; and, for a single run with layer redundancy,
    redundancy.png. InputError, when all that can be is written, where one of them can't."""
    tasks: list[Callable[[], None]] = [lambda: write_csv(runs, folder / "results.csv")]
    if any(point["widths"] is not None for run in runs for point in run["points"]):
        tasks.append(lambda: plot_sweep(runs, folder / "sweep.png"))
    if len(runs) == 1 and runs[0]["redundancy"] is not None:
        tasks.append(lambda: plot_redundancy(runs[0], folder / "redundancy.png"))
    errors = []
    for write in tasks:
        try:
            write()
        except InputError as error:
            errors.append(error)
    if errors:
        raise InputError("; ".join(dict.fromkeys(map(str, errors)))) from errors[0]
