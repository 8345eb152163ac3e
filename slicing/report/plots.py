"""Figures of finished runs: perplexity and accuracy over the slice base, redundancy and widths by layer."""

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slicing.experiment.comparison import best_dynamic_point, constant_point, dense_point, mean_accuracy_error
from slicing.experiment.results import Point, Redundancy, Results
from slicing.families import InputError
from slicing.files import replacing
from slicing.report.labels import accuracy_label, dense_labels, run_label, run_labels, text_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = Literal["perplexity", "mean_accuracy"]  # what a panel shows

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, SKY = "#0072B2", "#D55E00", "#56B4E9"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", SKY)
MARKERS = "os^vPX"
GREY = "#555555"
EXTRA = {
    "equal-parameters": ("D", "constant slicing with as many parameters as the best dynamic point"),
    "confirm": ("*", "confirmed with calibration at every point"),
}
WIDTH = 6.5  # inches, the text width of a page: fonts stay what they are in print
LOG_FROM = 5.0  # ratio of the highest to the lowest perplexity from which a logarithmic axis reads better
LOG_TICKS = ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))  # in a decade, from many to few
TICK_ROOM = 1 / 12  # of the axis, for a tick's label
PANEL_LINE, LEGEND_LINE = 28, 84  # characters that fit beside a panel and below it


def plot_sweep(runs: Sequence[Results], path: str | Path) -> None:
    """Write `sweep_figure` to a file whose kind is its ending's (.png, .pdf, .svg). InputError where that fails."""
    write_figure(lambda: sweep_figure(runs), path)


def plot_redundancy(results: Results, path: str | Path) -> None:
    """Write `redundancy_figure` to a file whose kind is its ending's (.png, .pdf, .svg). InputError where that
    fails."""
    write_figure(lambda: redundancy_figure(results), path)


def plot_layer_redundancy(redundancy: Redundancy, title: str, path: str | Path) -> None:
    """Write `layer_redundancy_figure` to a file whose kind is its ending's (.png, .pdf, .svg). InputError where that
    fails."""
    write_figure(lambda: layer_redundancy_figure(redundancy, title), path)


def write_figure(figure: "Callable[[], Figure]", path: str | Path) -> None:
    """Write a figure to a file whose kind is its ending's. InputError where that fails."""
    try:
        with replacing(Path(path)) as partial, own_settings():
            figure().savefig(partial, dpi=200)
    except InputError:
        raise
    except Exception as error:  # Matplotlib's and its parts' errors share no class
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"can't draw {path} ({why}): the numbers are kept, so it can be drawn again") from error


@contextmanager
def own_settings() -> Iterator[None]:
    """Matplotlib's own defaults, whatever a matplotlibrc says, and text as it is: no sign of a name begins a formula.

    Figures that are written to files need no backend: a notebook's, which MPLBACKEND passes on to processes that may
    not have it, would make the import fail.
    """
    names = ("MPLBACKEND", "MATPLOTLIBRC")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["MATPLOTLIBRC"] = os.devnull  # one that can't be read would make the import fail as well
    try:
        import matplotlib
    finally:
        del os.environ["MATPLOTLIBRC"]
        os.environ.update(before)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


@own_settings()
def sweep_figure(runs: Sequence[Results]) -> "Figure":
    """Perplexity and, where tasks were evaluated, mean accuracy over SB; dense and constant slicing as lines.

    Error bars of the accuracy, and the band around the dense model's, are one standard error. Points of the extra kinds
    are hollow; one of equal parameters stands at the SB of its own constant slicing.
    """
    from matplotlib.figure import Figure

    values: list[Value] = ["perplexity"]
    if any(point.mean_accuracy is not None for run in runs for point in run.points):
        values.append("mean_accuracy")
    figure = Figure(figsize=(WIDTH, 0.5 + 2.5 * len(values)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0])
    dense = _dense_lines(runs)
    for axes, value in zip(panels, values, strict=True):
        for point, colour, label in dense:
            _draw_dense(axes, point, value, colour, label)
        for index, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
            _draw_run(axes, run, value, *_style(index), label)
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)

    texts = {text_label(run) for run in runs}
    text = texts.pop() if len(texts) == 1 else "texts differ between runs"
    label = f"perplexity ({text})"
    panels[0].set_ylabel(label if len(label) <= PANEL_LINE else label.replace(" (", "\n(", 1))
    heights = [point.perplexity for run in runs for point in run.points]
    if heights and max(heights) > LOG_FROM * min(heights):
        logarithmic(panels[0], log_ticks(min(heights), max(heights)))
    if len(panels) > 1:
        panels[1].set_ylabel(accuracy_label(runs))
    panels[-1].set_xlabel("slice base SB (0: fully dynamic, SB = SP: constant)")
    _add_legend(figure, panels[0], runs)
    return figure


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, as many as can be written on a logarithmic axis."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    every = 1 + int((last - first) * TICK_ROOM)  # decades
    ticks: list[float] = []
    for parts in LOG_TICKS:
        ticks = [part * 10.0**decade for decade in range(first, last + every, every) for part in parts]
        start, end = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
        ticks = [tick for tick in ticks if start <= tick <= end]
        closest = min(after / tick for tick, after in pairwise(ticks))
        if math.log(closest) >= TICK_ROOM * math.log(end / start):
            break
    return ticks


def logarithmic(axes: "Axes", ticks: Sequence[float]) -> None:
    """A logarithmic y axis from the first tick to the last."""
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    margin = (ticks[-1] / ticks[0]) ** 0.03
    axes.set_yscale("log")
    axes.set_ylim(ticks[0] / margin, ticks[-1] * margin)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def height(point: Point, value: Value) -> float | None:
    """Where a point stands in the panel of this value; None where it has none."""
    return point.perplexity if value == "perplexity" else point.mean_accuracy


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of a run: 36 pairs, all different."""
    return COLOURS[index % 6], MARKERS[(index + index // 6) % 6]


def _dense_lines(runs: Sequence[Results]) -> list[tuple[Point, str, str]]:
    """Each dense model once, on each text and set of tasks: its point, colour and label. Black, or the colour of its
    first run where there are several."""
    found: dict[tuple[str, ...], tuple[int, Point]] = {}
    for index, run in enumerate(runs):
        point = dense_point(run)
        if point is not None:
            accuracy = "" if point.mean_accuracy is None else f"{point.mean_accuracy:.3f}"
            same = (run.model.name, text_label(run), f"{point.perplexity:.4g}")
            found.setdefault((*same, accuracy), (index, point))
    with_tasks = {key[:-1] for key in found if key[-1]}
    found = {key: line for key, line in found.items() if key[-1] or key[:-1] not in with_tasks}
    labels = dense_labels([runs[index] for index, _ in found.values()])
    return [
        (point, _style(index)[0] if len(found) > 1 else "black", label)
        for (index, point), label in zip(found.values(), labels, strict=True)
    ]


def _draw_dense(axes: "Axes", point: Point, value: Value, colour: str, label: str) -> None:
    """A dotted line, with a band of one standard error around an accuracy."""
    level = height(point, value)
    if level is None:
        return
    axes.axhline(level, color=colour, linestyle=":", linewidth=1.4, label=label)
    error = mean_accuracy_error(point) if value == "mean_accuracy" else None
    if error is not None:
        axes.axhspan(level - error, level + error, color=colour, alpha=0.1, linewidth=0)


def _draw_run(axes: "Axes", run: Results, value: Value, colour: str, marker: str, label: str) -> None:
    """The curve of one run with its constant slicing as a dashed line, and its extra points."""
    constant = constant_point(run)
    if constant is not None and (level := height(constant, value)) is not None:
        axes.axhline(level, color=colour, linestyle="--", linewidth=1)
    shapes = {"sweep": (marker, label, colour)} | {kind: (shape, None, "white") for kind, (shape, _) in EXTRA.items()}
    for kind, (shape, name, face) in shapes.items():
        points = sorted((point for point in run.points if point.kind == kind), key=lambda point: point.base or 0.0)
        levels = [(point, level) for point in points if (level := height(point, value)) is not None]
        bars = [mean_accuracy_error(point) for point, _ in levels] if value == "mean_accuracy" else []
        if levels:
            axes.errorbar(
                [point.base or 0.0 for point, _ in levels],
                [level for _, level in levels],
                yerr=[bar or 0.0 for bar in bars] or None,
                color=colour,
                marker=shape,
                markersize=9 if shape == "*" else 5,
                markerfacecolor=face,
                linestyle="-" if kind == "sweep" else "none",
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=name,
                zorder=3,
            )


def _add_legend(figure: "Figure", axes: "Axes", runs: Sequence[Results]) -> None:
    """Below the panels, where it covers nothing."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles, labels = axes.get_legend_handles_labels()
    colour = GREY if len(runs) > 1 else BLUE
    if any(constant_point(run) for run in runs):
        handles.append(Line2D([], [], color=colour, linestyle="--", linewidth=1))
        labels.append("constant slicing (SB = SP)" + (", the right end of each curve" if len(runs) > 1 else ""))
    for kind, (shape, label) in EXTRA.items():
        if any(point.kind == kind for run in runs for point in run.points):
            size = 9 if shape == "*" else 5
            handles.append(
                Line2D([], [], color=colour, marker=shape, markersize=size, markerfacecolor="white", linestyle="none")
            )
            labels.append(label)
    if any(mean_accuracy_error(point) is not None for run in runs for point in run.points):
        handles.append(Patch(color=GREY, alpha=0.2, linewidth=0))
        labels.append("bars and band: one standard error of the accuracy")
    labels = [textwrap.fill(label, LEGEND_LINE) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", fontsize=8.5, frameon=False)
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)


@own_settings()
def layer_redundancy_figure(redundancy: Redundancy, title: str) -> "Figure":
    """LR by layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    _draw_redundancy(axes, redundancy)
    axes.set_title(textwrap.fill(title, 72), fontsize=10)
    axes.set_xlabel("decoder layer")
    axes.set_xlim(-0.5, len(redundancy.normalised) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _draw_redundancy(axes: "Axes", redundancy: Redundancy) -> None:
    """Bars of LR, with one standard error where it was measured and the layers differ."""
    errors = None
    if redundancy.cosine is not None and redundancy.stderr is not None:
        spread = max(redundancy.cosine) - min(redundancy.cosine)
        errors = [error / spread for error in redundancy.stderr] if spread > 0 else None
    values = redundancy.normalised
    axes.bar(range(len(values)), values, color=SKY, yerr=errors, ecolor=GREY, capsize=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("layer redundancy LR")


@own_settings()
def redundancy_figure(results: Results) -> "Figure":
    """LR by layer above, widths of constant slicing and of the best dynamic point below.

    Error bars of LR are one standard error over the windows, where they are known. InputError where the
    results have no LR.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    redundancy, layers, hidden_size = results.redundancy, results.model.layers, results.model.hidden_size
    if redundancy is None:
        raise InputError("the run has no layer redundancy, since nothing was sliced: there is nothing to draw")
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)

    _draw_redundancy(top, redundancy)
    top.set_title(textwrap.fill(run_label(results), 72), fontsize=10)

    edges = [layer - 0.5 for layer in range(layers + 1)]
    constant = constant_point(results)
    best = best_dynamic_point(results, constant)
    bottom.axhline(hidden_size, color="black", linestyle=":", linewidth=1.4, label=f"dense, D = {hidden_size:,}")
    if constant is not None:
        bottom.stairs(
            constant.widths,
            edges,
            baseline=None,
            color=VERMILION,
            linestyle="--",
            linewidth=1.4,
            label="constant",
        )
    if best is not None:
        label = f"dynamic, SB = {best.base:.3g} (lowest perplexity)"
        bottom.stairs(best.widths, edges, baseline=None, color=BLUE, linewidth=1.8, label=label)
    bottom.set_ylim(0, 1.08 * hidden_size)
    bottom.set_xlim(edges[0], edges[-1])
    bottom.set_ylabel("width (hidden size kept)")
    bottom.set_xlabel("decoder layer")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return figure
