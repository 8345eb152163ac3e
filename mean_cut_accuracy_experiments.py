"""Slice a decoder LLM to a mean cut, from constant to fully dynamic, and measure perplexity and accuracy at each base.

    python mean_cut_accuracy_experiments.py --model demo --mean 0.3 --vector-cut $(python calculate_LR.py demo)
    python mean_cut_accuracy_experiments.py --model mistralai/Mistral-7B-v0.1 --dataset wikitext2 --mean 0.3 \\
        --tasks hellaswag winogrande arc_easy piqa --accuracy-limit 1000 --vector-cut mistral.json
"""

import os
import sys
from collections.abc import Sequence

from slicing.command_line import Parser, Screen, exit_code, path
from slicing.experiment.options import Options


def parse(argv: Sequence[str] | None) -> Options:
    """The options on the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub name, local folder, .gguf file, or demo")
    add("--mean", type=float, required=True, help="SP, the mean cut over the layers, in [0, 1); 0: evaluate only")
    add("--vector-cut", nargs="+", metavar="LR", help="LR of each layer, or the .json file of calculate_LR.py (default:"
        " measured on --source-for-vector)")  # fmt: skip
    add("--source-for-vector", help="text that LR is measured on where no vector is given (default: wikitext2)")
    add("--dataset", help="text of calibration (train) and perplexity: wikitext2, ptb, c4, alpaca, pg19, demo or a"
        " file with '{split}' in its name (default: wikitext2; demo for the demo model)")  # fmt: skip
    add("--text-column", help="field of a .jsonl or .parquet file that holds the text (default: text)")
    add("--cuda-device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto, the best there is)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto, the checkpoint's)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--trust-remote-code", action="store_true", help="run model code from the hub")
    add("--step", type=float, default=0.02, help="between the amounts SP - SB of the sweep (default: 0.02)")
    add("--round-interval", type=int, default=8, help="widths are multiples of this (default: 8; 1: the paper's, slow)")
    add(
        "--rotations", type=int, choices=(1, 2), default=2, help="bases a layer (default: 2, the paper's; 1 is smaller)"
    )
    add("--calibration", choices=("every-point", "once"), default="every-point", help="once: all points from the dense"
        " model's bases, faster and less exact (default: every-point)")  # fmt: skip
    add("--calibration-samples", type=int, default=128, help="random windows (default: 128)")
    add("--calibration-length", type=int, default=2048, help="tokens a calibration window (default: 2048)")
    add("--perplexity-split", default="test", help="part of the data set for perplexity (default: test)")
    add("--perplexity-length", type=int, default=2048, help="tokens a perplexity window (default: 2048)")
    add("--perplexity-samples", type=int, help="the first so many windows only (default: all)")
    add("--tasks", nargs="+", default=(), metavar="TASK", help="lm-eval tasks (default: none, perplexity only)")
    add("--accuracy-limit", type=int, help="first so many documents of each task (default: all)")
    add("--include-path", type=path, metavar="FOLDER", help="folder of lm-eval task files")
    add("--num-fewshot", type=int, help="examples in the prompt (default: each task's own number)")
    add("--compare", choices=("none", "equal-parameters"), default="none", help="equal-parameters adds the constant"
        " slicing that is as large as the best dynamic point (default: none)")  # fmt: skip
    add("--find-base", action="store_true", help="in place of the sweep, look for the best SB on the validation split")
    add("--offload", action="store_true", help="weights stay on the CPU, a layer at a time goes to the GPU (automatic"
        " where the model does not fit)")  # fmt: skip
    add("--batch-size", type=int, help="windows, and requests of tasks, run at once (default: what the device holds)")
    add("--seed", type=int, default=42, help="of calibration windows and few-shot examples (default: 42)")
    add(
        "--save-model",
        choices=("none", "best", "all"),
        default="none",
        help="sliced models to keep in the run's folder (default: none)",
    )
    add(
        "--output-dir",
        type=path,
        default="results",
        metavar="FOLDER",
        help="where the run's folder goes (default: results)",
    )
    add("--fresh", action="store_true", help="start over: forget the run's finished points and models, and"
        " take none over from other runs")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bars")
    given = vars(parser.parse_args(argv))
    text = "demo" if given["model"] == "demo" else "wikitext2"
    for name in ("dataset", "source_for_vector"):
        given[name] = given[name] or text
    for name in ("tasks", "vector_cut"):
        given[name] = None if given[name] is None else tuple(given[name])
    return Options(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(argv)
    message = "interrupted: the finished points are kept; the same command goes on from there"
    return exit_code(lambda: sweep(options), message)


def sweep(options: Options) -> None:
    """Check, run, print each row as it ends, then write csv and plots."""
    if options.quiet or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries too; read when tqdm is imported

    from slicing.experiment.options import check
    from slicing.experiment.ranks import join_ranks

    ranks = join_ranks()  # before the checks: where one rank fails them, the others learn it
    checked = check(options)
    if ranks.first:
        for note in checked.notes:
            print(f"note: {note}", file=sys.stderr)

    from slicing.experiment.sweep import Experiment
    from slicing.report.table import equal_size_summary, format_row, header, write_files

    experiment = Experiment(checked, ranks)
    screen = Screen()
    tasks = checked.tasks.loaded.reported if checked.tasks else []

    def print_row(point: dict, results: dict) -> None:
        if point["kind"] == "dense":
            screen.show(header(results, tasks=tasks))
        screen.show(format_row(point, results, tasks=tasks))

    results = experiment.run(print_row)
    if ranks.first:
        for line in equal_size_summary(results):
            screen.show(line)
        write_files([results], experiment.folder.folder)
        if not options.quiet:
            print(f"results, csv and plots: {experiment.folder.folder}", file=sys.stderr)
    ranks.leave()
    screen.close()


if __name__ == "__main__":
    sys.exit(main())
