"""Table and plots of finished runs: `python -m slicing.report FOLDER [FOLDER ...]` makes them again.

The table has a row a point. Changes of perplexity are in percent, against the dense model and against constant slicing
(SB = SP). Beside each is the paired standard error of the difference in log perplexity: both models read the same
windows, so the error of the difference is far smaller than that of either perplexity. So it is with the differences of
the mean accuracy, over the same documents. Runs that differ by their seed alone are one row: the mean of all, with the
standard deviation over the seeds.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slicing import flags
from slicing.command_line import Screen, exit_code
from slicing.experiment.results import Point, Results, read_results
from slicing.families import InputError
from slicing.flags import flag
from slicing.report.column import chosen, fitting
from slicing.report.columns import columns_for
from slicing.report.csv_file import csv_lines, write_csv
from slicing.report.formats import FORMATS, latex, markdown, text, text_header, text_row
from slicing.report.labels import run_labels
from slicing.report.plots import plot_redundancy, plot_sweep
from slicing.report.seeds import pooled
from slicing.report.size_plot import has_sizes, plot_size
from slicing.report.summary import equal_size_summary, mean_accuracy_line, speed_lines

__all__ = ["equal_size_summary", "format_row", "format_table", "header", "main", "write_csv", "write_files"]


def header(results: Results, *, tasks: Sequence[str] | None = None) -> str:
    """Three lines above the rows. `tasks`: names of the task columns; None takes those of the points in `results`."""
    return text_header(chosen(columns_for([results], tasks), None))


def format_row(point: Point, results: Results, *, tasks: Sequence[str] | None = None) -> str:
    """One line of fixed width. `results` holds the points to compare with; where one is missing the cell is a dash."""
    return text_row(chosen(columns_for([results], tasks), None), point, results)


def format_table(runs: Sequence[Results]) -> list[str]:
    """Lines of the table of one run or several; of several each row says model, rotations and calibration, and all else
    in which they differ."""
    return text(chosen(columns_for(runs, labelled=len(runs) > 1), None), runs)


@dataclass(frozen=True)
class Options:
    """The options of the report, a field a flag."""

    folders: tuple[str, ...] = flag(
        help="folders of runs, each with its results.json", positional=True, metavar="FOLDER"
    )
    format: str = flag("text", help="of the table on stdout", choices=FORMATS)
    columns: tuple[str, ...] = flag(
        (), help="columns to print, by name; one that is not there is answered with all names", default="the usual ones"
    )
    wide: bool = flag(
        False, help="print a text table as wide as it is; else columns that don't fit the terminal are left out"
    )
    each_seed: bool = flag(False, help="a row for each seed, where runs differ by nothing else; else their mean")
    output: str | None = flag(
        None,
        help="where results.csv, sweep.png (if something was sliced), redundancy.png (of one run) and size.png (of"
        " several) go",
        default="the run's folder; for several runs the folder that holds the first",
        metavar="FOLDER",
        is_path=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command: table and summary to stdout, results.csv and the plots into a folder. Returns the exit code."""
    options = flags.parse(Options, "Tabulate and draw finished runs again.", argv, program="python -m slicing.report")
    return exit_code(lambda: _report(options), "interrupted")


def _report(options: Options) -> None:
    runs = [read_results(folder) for folder in options.folders]
    if not options.each_seed:
        runs = pooled(runs)
    screen = Screen()
    for line in _printed(runs, options):
        screen.show(line)
    first = Path(options.folders[0])
    beside = first if len(options.folders) == 1 else first.resolve().parent
    write_files(runs, Path(options.output) if options.output else beside)
    screen.close()


def _printed(runs: Sequence[Results], options: Options) -> list[str]:
    """The lines on stdout: the table in its format, and below one of text what it says."""
    if options.format == "csv":
        return csv_lines(runs, options.columns or None)
    columns = chosen(columns_for(runs, labelled=len(runs) > 1), options.columns or None)
    if options.format != "text":
        return (markdown if options.format == "markdown" else latex)(columns, runs)
    width = None if options.wide else terminal_width()
    columns, left_out = fitting(columns, width)
    if left_out:
        names = ", ".join(column.name for column in left_out)
        print(f"note: left out to fit {width} characters: {names}; --wide shows them", file=sys.stderr)
    below: list[str] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        below += [line if len(runs) == 1 else f"{label}: {line}" for line in equal_size_summary(run)]
    below += mean_accuracy_line(runs) + speed_lines(runs)
    wrapped = below if width is None else [part for line in below for part in textwrap.wrap(line, max(width, 20))]
    return [*text(columns, runs), *wrapped]


def terminal_width() -> int | None:
    """Characters a line; None where the output goes into a file or a pipe and COLUMNS doesn't say it."""
    said = os.environ.get("COLUMNS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def write_files(runs: Sequence[Results], folder: Path) -> None:
    """Write results.csv; if something was sliced, sweep.png; for a single run with layer redundancy, redundancy.png;
    for several, size.png. InputError, when all that can be is written, if one of them can't."""
    tasks: list[Callable[[], None]] = [lambda: write_csv(runs, folder / "results.csv")]
    if any(point.widths is not None for run in runs for point in run.points):
        tasks.append(lambda: plot_sweep(runs, folder / "sweep.png"))
    if len(runs) == 1 and runs[0].redundancy is not None:
        tasks.append(lambda: plot_redundancy(runs[0], folder / "redundancy.png"))
    if has_sizes(runs):
        tasks.append(lambda: plot_size(runs, folder / "size.png"))
    errors = []
    for write in tasks:
        try:
            write()
        except InputError as error:
            errors.append(error)
    if errors:
        raise InputError("; ".join(dict.fromkeys(map(str, errors)))) from errors[0]
