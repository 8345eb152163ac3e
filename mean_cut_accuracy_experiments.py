"""Slice a decoder LLM to a mean cut, from constant to fully dynamic, and measure perplexity and accuracy at each base.

    python mean_cut_accuracy_experiments.py --model demo --mean 0.3 --vector-cut $(python calculate_LR.py demo)
    python mean_cut_accuracy_experiments.py --model mistralai/Mistral-7B-v0.1 --dataset wikitext2 --mean 0.3 \\
        --tasks hellaswag winogrande arc_easy piqa --accuracy-limit 1000 --vector-cut mistral.json
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slicing import InputError, flags
from slicing.command_line import Screen, exit_code
from slicing.experiment.options import Options

if TYPE_CHECKING:
    from slicing.experiment.ranks import Ranks
    from slicing.experiment.results import Point, Results


def parse(argv: Sequence[str] | None) -> Options:
    """The options on the command line."""
    return flags.parse(Options, __doc__, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(argv)
    message = "interrupted: the finished points are kept; the same command goes on from there"
    return exit_code(lambda: sweep(options), message)


def sweep(options: Options) -> None:
    """Run, with each of --seeds where they are given; then also their table."""
    if options.quiet or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries too; read when tqdm is imported

    from slicing.experiment.ranks import join_ranks

    ranks = join_ranks()  # before the checks: where one rank fails them, the others learn it
    screen = Screen()
    flags.check_limits(options)
    if len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"--seeds has {' '.join(map(str, options.seeds))}: each may be there once")
    runs = [run(replace(options, seed=seed, seeds=()), ranks, screen) for seed in options.seeds or (options.seed,)]
    if ranks.first and len(runs) > 1:
        from slicing.report.seeds import pooled
        from slicing.report.table import format_table, write_files

        for line in ["", *format_table(pooled(runs))]:
            screen.show(line)
        write_files(pooled(runs), Path(options.output_dir))
    ranks.leave()
    screen.close()


def run(options: Options, ranks: "Ranks", screen: Screen) -> "Results":
    """Check, run, print each row as it ends, then write csv and plots. A run that is finished is printed again."""
    from slicing.experiment.repeat import finished_run, write_stamp

    if ranks.count == 1 and not options.fresh:
        finished = finished_run(options)
        if finished is not None:
            show_again(*finished, options, screen)
            return finished[1]

    from slicing.experiment.checks import check

    inputs = check(options)
    if ranks.first:
        for note in inputs.notes:
            print(f"note: {note}", file=sys.stderr)

    from slicing.experiment.sweep import Experiment
    from slicing.report.model_card import write_card
    from slicing.report.table import equal_size_summary, format_row, header, write_files

    experiment = Experiment(inputs, ranks)
    tasks = inputs.tasks.loaded.reported if inputs.tasks else []

    def print_row(point: "Point", results: "Results") -> None:
        if point.kind == "dense":
            screen.show(header(results, tasks=tasks))
        screen.show(format_row(point, results, tasks=tasks))

    results = experiment.run(print_row, write_card)
    if ranks.first:
        for line in equal_size_summary(results):
            screen.show(line)
        write_files([results], experiment.folder.folder)
        write_stamp(experiment.folder.folder, inputs)
        if not options.quiet:
            print(f"results, csv and plots: {experiment.folder.folder}", file=sys.stderr)
    return results


def show_again(folder: Path, results: "Results", notes: Sequence[str], options: Options, screen: Screen) -> None:
    """What the run printed, and its plots if they are no longer there."""
    from slicing.report.table import equal_size_summary, format_row, header, write_files

    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for line in (header(results), *(format_row(point, results) for point in results.points)):
        screen.show(line)
    for line in equal_size_summary(results):
        screen.show(line)
    if any(not (folder / name).exists() for name in ("results.csv", "sweep.png")):
        write_files([results], folder)
    if not options.quiet:
        print(f"results, csv and plots, nothing has changed since they were made: {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
