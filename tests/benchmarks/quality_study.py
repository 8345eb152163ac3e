"""Perplexity and accuracy against true parameters: constant and dynamic slicing, one and two rotations, both
calibrations.

    PYTHONPATH=. python tests/benchmarks/quality_study.py --dataset 'wiki.{split}.txt' --json study.json
    PYTHONPATH=. python tests/benchmarks/quality_study.py --from-json study.json --plot study.png
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import slicing
from slicing import bases
from slicing.bases import Bases, dense_bases
from slicing.experiment.comparison import paired_standard_error
from slicing.likelihood import window_nll
from slicing.rotation import rotate_and_slice, slice_with_bases
from slicing.tasks import evaluate_tasks, resolve_tasks

METHODS = {  # name -> (slice base as a part of the mean, rotations)
    "constant": (1.0, 2),
    "dynamic": (0.0, 2),
    "constant, one rotation": (1.0, 1),
    "dynamic, one rotation": (0.0, 1),
}
CALIBRATIONS = ("every-point", "once")
CUTS = (0.15, 0.20)  # true cuts at which methods are compared
REDUNDANCY_LENGTH = 1024  # tokens of a window that LR is measured on
MULTIPLES = (1, 32, 64)  # of widths, in place of 8


class Study:
    """The model, the windows, and what has been measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.tokenizer = slicing.load_model(options.model, device=options.device, dtype=options.dtype)
        self.device = next(self.model.parameters()).device
        self.calibration = self.text("train", options.length, count=options.samples)
        self.test = self.text("test", options.length)[: options.test_windows]
        self.redundancy = self.measure_redundancy(
            self.text("validation", REDUNDANCY_LENGTH, count=options.samples, stride=REDUNDANCY_LENGTH)
        )
        self.parameters = slicing.count_parameters(self.model)
        self.bases: dict[int, Bases] = {}
        self.tasks = resolve_tasks(options.tasks, options.include_path) if options.tasks else None

    def text(self, split: str, length: int, **more: Any) -> torch.Tensor:
        """Token windows of the study's text."""
        return slicing.token_windows(self.options.dataset, self.tokenizer, split=split, length=length, **more)

    def measure_redundancy(self, windows: torch.Tensor) -> list[float]:
        """LR on these windows."""
        found: list[float] = slicing.layer_redundancy(self.model, windows).normalised.tolist()
        return found

    def widths(self, mean: float, base: float, redundancy: list[float] | None = None, multiple: int = 8) -> list[int]:
        """Widths at a mean and a base."""
        size = self.model.config.hidden_size
        vector = redundancy or self.redundancy
        slices = slicing.final_slices(vector, mean=mean, base=base, limit=1 - multiple / size)
        return slicing.slice_widths(slices, size, multiple=multiple)

    def sliced(self, widths: list[int], rotations: int, calibration: str, windows: torch.Tensor | None = None) -> Any:
        """A sliced model."""
        if calibration == "every-point":
            chosen = self.calibration if windows is None else windows
            return rotate_and_slice(self.model, chosen, widths, rotations=rotations)
        if rotations not in self.bases:
            self.bases[rotations] = dense_bases(self.model, self.calibration, rotations=rotations)
        return slice_with_bases(self.model, self.bases[rotations], widths)

    def row(self, name: str, model: Any, tasks: bool = False, **more: Any) -> dict[str, Any]:
        """Measure a model."""
        nll = window_nll(model, self.test, progress=False)
        scores: dict[str, Any] = {}
        if tasks and self.tasks is not None:
            found = evaluate_tasks(model, self.tokenizer, self.tasks, limit=self.options.limit, progress=False)
            scores = {
                task: {key: getattr(score, key) for key in ("metric", "value", "stderr")}
                for task, score in found.items()
            }
        cut = 1 - slicing.count_parameters(model) / self.parameters
        row = {"name": name, "cut": cut, "perplexity": nll.mean().exp().item(), "nll": nll.tolist(), "tasks": scores}
        print(f"{name:50s} cut {cut:7.3%}  perplexity {row['perplexity']:8.3f}", scores, file=sys.stderr, flush=True)
        return row | more

    def curves(self) -> Iterator[dict[str, Any]]:
        """Every method at every mean with both calibrations, and the dense model first."""
        yield self.row("dense", self.model, tasks=True, method="dense", calibration=None, mean=0.0)
        for calibration in self.options.calibrations:
            for method, (part, rotations) in METHODS.items():
                for mean in self.options.means:
                    model = self.sliced(self.widths(mean, part * mean), rotations, calibration)
                    tasks = calibration == "every-point" and mean in self.options.task_means
                    name = f"{method}, {calibration}, mean {mean:g}"
                    yield self.row(name, model, tasks, method=method, calibration=calibration, mean=mean)

    def variations(self) -> Iterator[dict[str, Any]]:
        """Other choices at mean 0.3, SB 0, one rotation."""
        mean, options = 0.3, self.options

        def measure(name: str, widths: list[int] | None = None, windows: torch.Tensor | None = None) -> dict[str, Any]:
            model = self.sliced(widths or self.widths(mean, 0.0), 1, "every-point", windows)
            return self.row(name, model, method="variation", calibration="every-point", mean=mean)

        yield measure("none: dynamic, one rotation, calibrated at every point")
        own = bases.MIDDLE_WEIGHT
        for weight in (0.3, 1.0, 10.0):
            bases.MIDDLE_WEIGHT = weight
            yield measure(f"weight of the middle's covariance {weight:g}")
        bases.MIDDLE_WEIGHT = own
        for multiple in MULTIPLES:
            yield measure(f"widths in multiples of {multiple}", self.widths(mean, 0.0, multiple=multiple))
        on_calibration = self.measure_redundancy(self.calibration[:, :REDUNDANCY_LENGTH])
        yield measure("LR on the calibration windows", self.widths(mean, 0.0, on_calibration))
        for base in (0.05, 0.1, 0.15):
            yield measure(f"SB {base:g}", self.widths(mean, base))
        if options.other_text:
            other = slicing.token_windows(
                options.other_text, self.tokenizer, split="train", length=options.length, count=options.samples
            )
            yield measure("calibrated on the other text", windows=other)
            half = options.samples // 2
            mixed = torch.cat([self.calibration[:half], other[: options.samples - half]])
            yield measure("calibrated on half of each text", windows=mixed)
            yield measure(
                "LR on the other text", self.widths(mean, 0.0, self.measure_redundancy(other[:, :REDUNDANCY_LENGTH]))
            )


def interpolated(rows: Sequence[dict[str, Any]], cut: float) -> float | None:
    """Perplexity of a curve at a true cut, log-linear between its points; None outside them."""
    points = sorted((row["cut"], math.log(row["perplexity"])) for row in rows)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= cut <= right:
            return math.exp(low + (high - low) * (cut - left) / (right - left))
    return None


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """The study in Markdown: the curves, the comparison at equal true parameters, accuracies, variations."""
    dense = rows[0]
    lines = [f"Dense perplexity {dense['perplexity']:.2f}.", ""]
    means = sorted({row["mean"] for row in rows if row["method"] in METHODS})
    lines += ["| method | calibration | " + " | ".join(f"mean {mean:g}" for mean in means) + " |"]
    lines += ["|---|---|" + "---|" * len(means)]
    curves = {(method, kind): [] for method in METHODS for kind in CALIBRATIONS}
    for row in rows:
        if row["method"] in METHODS:
            curves[row["method"], row["calibration"]].append(row)
    for (method, kind), curve in curves.items():
        cells = [f"{row['perplexity']:.2f} ({row['cut']:.1%})" for row in sorted(curve, key=lambda row: row["mean"])]
        lines.append(f"| {method} | {kind} | " + " | ".join(cells) + " |")
    lines += ["", "| at equal true parameters | " + " | ".join(f"cut {cut:.0%}" for cut in CUTS) + " |"]
    lines.append("|---|" + "---|" * len(CUTS))
    for (method, kind), curve in curves.items():
        cells = []
        for cut in CUTS:
            value, base = interpolated(curve, cut), interpolated(curves["constant", "every-point"], cut)
            cells.append("-" if value is None or base is None else f"{value:.2f} ({value / base - 1:+.1%})")
        lines.append(f"| {method}, {kind} | " + " | ".join(cells) + " |")
    scored = [row for row in rows if row["tasks"]]
    if scored:
        names = list(scored[0]["tasks"])
        lines += ["", "| model | true cut | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
        for row in scored:
            cells = [_score(row["tasks"][name]) for name in names]
            lines.append(f"| {row['name']} | {row['cut']:.1%} | " + " | ".join(cells) + " |")
    variations = [row for row in rows if row["method"] == "variation"]
    if variations:
        reference = variations[0]
        lines += [
            "",
            "| variation (mean 0.3, one rotation) | true cut | perplexity | paired SE(ln) |",
            "|---|---|---|---|",
        ]
        for row in variations:
            error = paired_standard_error(row["nll"], reference["nll"]) if row is not reference else None
            paired = "" if error is None else f"{error:.4f}"
            lines.append(f"| {row['name']} | {row['cut']:.1%} | {row['perplexity']:.2f} | {paired} |")
    return lines


def _score(score: dict[str, Any]) -> str:
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Perplexity over the true cut, a curve a method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    colours = ("#D55E00", "#0072B2", "#E69F00", "#009E73")
    for (method, _), colour in zip(METHODS.items(), colours, strict=True):
        for calibration, style in zip(CALIBRATIONS, ("-", ":"), strict=True):
            curve = [row for row in rows if row["method"] == method and row["calibration"] == calibration]
            curve.sort(key=lambda row: row["cut"])
            label = f"{method}{'' if calibration == 'every-point' else ', calibrated once'}"
            cuts = [100 * row["cut"] for row in curve]
            axes.plot(cuts, [row["perplexity"] for row in curve], style, marker="o", ms=4, color=colour, label=label)
    axes.axhline(rows[0]["perplexity"], color="black", lw=1, ls="--", label="dense")
    axes.set_yscale("log")
    axes.set_yticks([20, 30, 40, 50, 70, 100], ["20", "30", "40", "50", "70", "100"])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("true cut: parameters removed (%)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=200)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo")
    add("--dataset", default="demo", help="as of mean_cut_accuracy_experiments.py (default: demo)")
    add("--other-text", help="a second text, for the variations of calibration")
    add("--means", type=float, nargs="+", default=[0.1, 0.2, 0.25, 0.3, 0.35, 0.4])
    add("--calibrations", nargs="+", choices=CALIBRATIONS, default=CALIBRATIONS)
    add("--samples", type=int, default=128, help="calibration windows")
    add("--length", type=int, default=2048, help="tokens a window")
    add("--test-windows", type=int, help="the first so many windows of the test split (default: all)")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--tasks", nargs="+", default=[], help="lm-eval tasks at --task-means, with a calibration at every point")
    add("--task-means", type=float, nargs="+", default=[0.2, 0.3])
    add("--limit", type=int)
    add("--include-path")
    add("--variations", action="store_true", help="also other choices at mean 0.3")
    add("--json", help="write what was measured")
    add("--from-json", nargs="+", help="measure nothing: tabulate and draw what these files hold together")
    add("--plot", help="draw the curves")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure or read, then print and draw."""
    options = parse(argv)
    if options.from_json:
        rows = [row for file in options.from_json for row in json.loads(Path(file).read_text())]
    else:
        start = time.perf_counter()
        study = Study(options)
        rows = []
        for row in itertools.chain(study.curves(), study.variations() if options.variations else ()):
            rows.append(row)
            if options.json:
                Path(options.json).write_text(json.dumps(rows))
        print(f"{time.perf_counter() - start:.0f} s on {study.device}", file=sys.stderr)
    print("\n".join(tables(rows)))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
