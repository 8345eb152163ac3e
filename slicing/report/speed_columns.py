"""The columns of --speed: tokens a second and memory, each with its ratio to the dense model's."""

from collections.abc import Callable, Sequence

from slicing.experiment.results import Point, Results
from slicing.report.column import Cell, Column, optional

_SPEEDS: tuple[tuple[str, tuple[str, str], int, Callable[[float], str]], ...] = (
    ("prefill", ("prefill", "tokens/s"), 8, "{:.0f}".format),
    ("decode", ("decode", "tokens/s"), 8, "{:.1f}".format),
    ("memory", ("peak", "GB"), 6, lambda size: f"{size / 1e9:.2f}"),
)


def speed_columns(runs: Sequence[Results]) -> list[Column]:
    """Of --speed, each figure with its ratio to the dense model's, where a run has them."""
    measured = [point.speed for run in runs for point in run.points if point.speed is not None]
    if not measured:
        return []
    columns = []
    for name, title, width, shown_as in _SPEEDS:
        is_shown = any(getattr(speed, name) is not None for speed in measured)
        columns += [
            Column(name, title, width, _cell(name, shown_as), shown=is_shown, rank=9),
            Column(f"{name}_ratio", ("x", "dense"), 5, _ratio_cell(name), shown=is_shown, rank=9),
        ]
    return columns


def speed_of(point: Point, name: str) -> tuple[float | None, float | None]:
    """A figure of --speed, and its ratio to the dense model's, which took turns with it."""
    if point.speed is None:
        return None, None
    value, dense = getattr(point.speed, name), getattr(point.speed, f"dense_{name}")
    return value, None if value is None or dense is None else value / dense


def _cell(name: str, shown_as: Callable[[float], str]) -> Cell:
    def cell(point: Point, _: Results) -> str:
        value, _ratio = speed_of(point, name)
        return "-" if value is None else shown_as(value)

    return cell


def _ratio_cell(name: str) -> Cell:
    return lambda point, _: "-" if point.kind == "dense" else optional(speed_of(point, name)[1], ".2f")
