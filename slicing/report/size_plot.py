"""The figure of several runs: perplexity and accuracy against true parameters, of constant and dynamic slicing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slicing.experiment.comparison import (
    best_dynamic_point,
    constant_point,
    dense_point,
    mean_accuracy_error,
    paired_standard_error,
)
from slicing.experiment.results import Point, Results
from slicing.report.labels import accuracy_label, model_name, text_label, way_label
from slicing.report.plots import (
    COLOURS,
    LOG_FROM,
    WIDTH,
    Value,
    height,
    log_ticks,
    logarithmic,
    own_settings,
    write_figure,
)
from slicing.report.seeds import PooledPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[str, list[tuple[Point, Results]]]  # how a model was sliced, and its points from the largest on


def has_sizes(runs: Sequence[Results]) -> bool:
    """Whether there is more than one run in which something was sliced."""
    return sum(constant_point(run) is not None for run in runs) > 1


def plot_size(runs: Sequence[Results], path: str | Path) -> None:
    """Write `size_figure` to a file whose kind is its ending's (.png, .pdf, .svg). InputError where that fails."""
    write_figure(lambda: size_figure(runs), path)


def size_curves(runs: Sequence[Results]) -> list[Curve]:
    """Of each model, sliced in one way to several means: constant slicing and the best dynamic points."""
    found: dict[str, list[tuple[Point, Results]]] = {}
    for run in runs:
        constant = constant_point(run)
        if constant is None:
            continue
        best = best_dynamic_point(run, constant)
        for word, point in (("constant", constant), ("dynamic, best SB", best)):
            if point is not None:
                found.setdefault(f"{way_label(run)}, {word}", []).append((point, run))
    return [(label, sorted(points, key=lambda pair: -pair[0].parameters)) for label, points in found.items()]


@own_settings()
def size_figure(runs: Sequence[Results]) -> "Figure":
    """Perplexity and, if tasks were evaluated, mean accuracy over the true number of parameters.

    A star is a dense model. Bars: of the perplexity the paired standard error against the dense model over the windows,
    or the standard deviation over the seeds where runs were pooled; of the accuracy its standard error or the same.
    """
    from matplotlib.figure import Figure

    values: list[Value] = ["perplexity"]
    if any(point.mean_accuracy is not None for run in runs for point in run.points):
        values.append("mean_accuracy")
    figure = Figure(figsize=(WIDTH, 0.5 + 2.6 * len(values)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0])
    for axes, value in zip(panels, values, strict=True):
        _draw(axes, runs, value)
        axes.grid(alpha=0.3)
    texts = {text_label(run) for run in runs}
    panels[0].set_ylabel(f"perplexity\n({texts.pop() if len(texts) == 1 else 'texts differ between runs'})")
    heights = [point.perplexity for _, points in size_curves(runs) for point, _ in points]
    heights += [point.perplexity for run in runs if (point := dense_point(run)) is not None]
    if max(heights) > LOG_FROM * min(heights):
        logarithmic(panels[0], log_ticks(min(heights), max(heights)))
    if len(panels) > 1:
        panels[1].set_ylabel(accuracy_label(runs))
    panels[-1].set_xlabel("parameters (millions), shortcuts and head included")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=8.5, frameon=False)
    return figure


def _draw(axes: "Axes", runs: Sequence[Results], value: Value) -> None:
    """All curves of one panel; constant and dynamic of one way in one colour."""
    colours: dict[str, str] = {}
    for run in runs:
        colours.setdefault(way_label(run), COLOURS[len(colours) % len(COLOURS)])
    for label, points in size_curves(runs):
        drawn = [(*pair, level) for pair in points if (level := height(pair[0], value)) is not None]
        is_constant = label.endswith(", constant")
        bars = [_error(point, run, value) or 0.0 for point, run, _ in drawn]
        axes.errorbar(
            [point.parameters / 1e6 for point, _, _ in drawn],
            [level for _, _, level in drawn],
            yerr=bars if any(bars) else None,
            color=colours[way_label(points[0][1])],
            marker="s" if is_constant else "o",
            markerfacecolor="white" if is_constant else None,
            linestyle="--" if is_constant else "-",
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=label,
        )
    stars: dict[str, tuple[int, float]] = {}
    for run in runs:
        dense = dense_point(run)
        if dense is not None and (level := height(dense, value)) is not None:
            stars.setdefault(f"{model_name(run)}, dense", (dense.parameters, level))
    for label, (parameters, level) in stars.items():
        axes.plot(
            parameters / 1e6,
            level,
            marker="*",
            markersize=11,
            color="black",
            linestyle="none",
            label=label,
        )


def _error(point: Point, run: Results, value: Value) -> float | None:
    """Half the length of a bar."""
    if isinstance(point, PooledPoint):
        return point.perplexity_sd if value == "perplexity" else point.accuracy_sd
    if value == "mean_accuracy":
        return mean_accuracy_error(point)
    dense = dense_point(run)
    paired = None if dense is None else paired_standard_error(point.nll, dense.nll)
    return None if paired is None else paired * point.perplexity
