"""Figures of finished runs: perplexity and accuracy over the slice base, redundancy and widths by layer."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicing.families import InputError
from slicing.results import (
    Results,
    best_dynamic_point,
    constant_point,
    dense_point,
    mean_accuracy_error,
    model_name,
    run_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def plot_sweep(runs: Sequence[Results], path: str | Path) -> None:
    """Write `sweep_figure` to a file whose kind is its ending's (.png, .pdf, .svg)."""
    sweep_figure(runs).savefig(path, dpi=200)


def plot_redundancy(results: Results, path: str | Path) -> None:
    """Write `redundancy_figure` to a file whose kind is its ending's (.png, .pdf, .svg)."""
    redundancy_figure(results).savefig(path, dpi=200)


def sweep_figure(runs: Sequence[Results]) -> "Figure":
    """Perplexity and, where tasks were evaluated, mean accuracy over SB; dense and constant slicing as lines.

    Error bars of the accuracy are one standard error. Points of the extra kinds are hollow; one of equal parameters
    stands at the SB of its own constant slicing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = ["perplexity"]
    if any(point["mean_accuracy"] is not None for run in runs for point in run["points"]):
        values.append("mean_accuracy")
    figure = Figure(figsize=(WIDTH, 0.5 + 2.5 * len(values)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0])
    for axes, value in zip(panels, values, strict=True):
        _draw_dense(axes, runs, value)
        for index, run in enumerate(runs):
            _draw_run(axes, run, value, *_style(index))
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)

    texts = {f"{text['source']} {text['split'] or ''}".strip() for run in runs for text in [run["data"]["perplexity"]]}
    panels[0].set_ylabel("perplexity" + (f" ({texts.pop()})" if len(texts) == 1 else ""))
    heights = [point["perplexity"] for run in runs for point in run["points"]]
    if heights and max(heights) > LOG_FROM * min(heights):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    if len(panels) > 1:
        tasks = {name for run in runs for point in run["points"] for name in point["tasks"]}
        panels[1].set_ylabel("accuracy" if len(tasks) == 1 else f"mean accuracy of {len(tasks)} tasks")
    panels[-1].set_xlabel("slice base SB (0: fully dynamic, SB = SP: constant)")
    _add_legend(figure, panels[0], runs)
    return figure


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of a run: 36 pairs, all different."""
    return COLOURS[index % 6], MARKERS[(index + index // 6) % 6]


def _draw_dense(axes: "Axes", runs: Sequence[Results], value: str) -> None:
    """A dotted line for each dense model, once: black, or in the colour of its first run where there are several."""
    several = len({model_name(run) for run in runs}) > 1
    drawn = set()
    for index, run in enumerate(runs):
        point = dense_point(run)
        if point is None or point[value] is None or (model_name(run), point[value]) in drawn:
            continue
        drawn.add((model_name(run), point[value]))
        colour = _style(index)[0] if several else "black"
        axes.axhline(point[value], color=colour, linestyle=":", linewidth=1.4, label=f"{model_name(run)}, dense")


def _draw_run(axes: "Axes", run: Results, value: str, colour: str, marker: str) -> None:
    """The curve of one run with its constant slicing as a dashed line, and its extra points."""
    constant = constant_point(run)
    if constant is not None and constant[value] is not None:
        axes.axhline(constant[value], color=colour, linestyle="--", linewidth=1)
    shapes = {"sweep": (marker, run_label(run), colour)} | {
        kind: (shape, "", "white") for kind, (shape, _) in EXTRA.items()
    }
    for kind, (shape, label, face) in shapes.items():
        points = [point for point in run["points"] if point["kind"] == kind and point[value] is not None]
        points.sort(key=lambda point: point["base"])
        bars = [mean_accuracy_error(point) for point in points] if value == "mean_accuracy" else []
        if points:
            axes.errorbar(
                [point["base"] for point in points],
                [point[value] for point in points],
                yerr=[bar or 0.0 for bar in bars] or None,
                color=colour,
                marker=shape,
                markersize=9 if shape == "*" else 5,
                markerfacecolor=face,
                linestyle="-" if kind == "sweep" else "none",
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=label or None,
                zorder=3,
            )


def _add_legend(figure: "Figure", axes: "Axes", runs: Sequence[Results]) -> None:
    """Below the panels, where it covers nothing."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    colour = GREY if len(runs) > 1 else BLUE
    if any(constant_point(run) for run in runs):
        handles.append(Line2D([], [], color=colour, linestyle="--", linewidth=1))
        labels.append("constant slicing (SB = SP)" + (", the right end of each curve" if len(runs) > 1 else ""))
    for kind, (shape, label) in EXTRA.items():
        if any(point["kind"] == kind for run in runs for point in run["points"]):
            size = 9 if shape == "*" else 5
            handles.append(
                Line2D([], [], color=colour, marker=shape, markersize=size, markerfacecolor="white", linestyle="none")
            )
            labels.append(label)
    labels = [textwrap.fill(label, 80) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", fontsize=8.5, frameon=False)
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)


def plot_layer_redundancy(redundancy: dict[str, Any], title: str, path: str | Path) -> None:
    """Write a figure of LR by layer; `redundancy` as in results.json."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    _draw_redundancy(axes, redundancy)
    axes.set_title(textwrap.fill(title, 72), fontsize=10)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=200)


def _draw_redundancy(axes: "Axes", redundancy: dict[str, Any]) -> None:
    """Bars of LR, with one standard error where it was measured."""
    errors = None
    if redundancy["cosine"] is not None and redundancy["stderr"] is not None:
        spread = max(redundancy["cosine"]) - min(redundancy["cosine"])
        errors = [error / spread for error in redundancy["stderr"]]
    values = redundancy["normalised"]
    axes.bar(range(len(values)), values, color=SKY, yerr=errors, ecolor=GREY, capsize=2)
    axes.set_ylabel("layer redundancy LR")


def redundancy_figure(results: Results) -> "Figure":
    """LR by layer above, widths of constant slicing and of the best dynamic point below.

    Error bars of LR are one standard error over the windows, where LR was measured in this run. InputError where the
    results have no LR.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    redundancy, layers, hidden_size = results["redundancy"], results["model"]["layers"], results["model"]["hidden_size"]
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
            constant["widths"],
            edges,
            baseline=None,
            color=VERMILION,
            linestyle="--",
            linewidth=1.4,
            label="constant",
        )
    if best is not None:
        label = f"dynamic, SB = {best['base']:.3g} (lowest perplexity)"
        bottom.stairs(best["widths"], edges, baseline=None, color=BLUE, linewidth=1.8, label=label)
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
