"""Which points a run measures: SP and SB of each, and the widths that they give."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slicing.schedule import (
    difference,
    final_slices,
    highest_inner_cut,
    inner_widths,
    slice_widths,
    sweep_amounts,
)

if TYPE_CHECKING:
    from slicing.experiment.options import Options
    from slicing.experiment.results import Kind


@dataclass(frozen=True)
class Target:
    """A point to be measured: `base` None is the dense model, else SB, with FS and widths (L); SP, SB and widths (L) of
    the MLPs' neurons where these are cut. Where they alone are, `mean` and `base` are theirs too. A `kind` of "search"
    stands for no point, but in the key of a search."""

    kind: "Kind | Literal['search']"
    mean: float | None = None
    base: float | None = None
    slices: list[float] | None = None
    widths: list[int] | None = None
    calibration: str | None = None
    inner_mean: float | None = None
    inner_base: float | None = None
    inner_widths: list[int] | None = None

    @property
    def amount(self) -> float | None:
        """SP - SB; None for the dense model."""
        return None if self.mean is None or self.base is None else difference(self.mean, self.base)


@dataclass(frozen=True)
class Missing:
    """What is still to be measured of a point, which has a key: all but its speed, its speed, or both."""

    target: Target
    key: str
    point: bool
    speed: bool


@dataclass(frozen=True)
class Plan:
    """The points that are possible with some options on a model of hidden size D.

    inner_sizes: inner width of each layer (L), where it is to be cut.
    """

    options: "Options"
    hidden_size: int
    inner_sizes: tuple[int, ...] = ()

    def targets(self, vector: list[float] | None) -> list[Target]:
        """The dense model, constant slicing, and the further amounts up to the mean, by LR (L)."""
        mean = self.options.swept
        if mean == 0 or vector is None:
            return [Target("dense")]
        amounts = sweep_amounts(mean, self.options.step)
        return [Target("dense"), *(self.target(mean, difference(mean, amount), vector) for amount in amounts)]

    def target(
        self,
        mean: float,
        base: float,
        vector: list[float],
        *,
        kind: "Kind | Literal['search']" = "sweep",
        calibration: str | None = None,
    ) -> Target:
        """The point with these SP and SB of the sweep; what else is cut has its own SP in proportion, and SB / SP."""
        options, multiple = self.options, self.options.round_interval
        calibration = calibration or options.calibration
        stream, inner = (mean, base), (mean, base)
        if options.mean:
            part = options.inner_mean / options.mean
            inner = mean * part, base * part
            if mean == options.mean:  # as it was given, to the last digit
                inner = options.inner_mean, options.inner_mean * (base / mean)
        else:
            stream = 0.0, 0.0
        slices = final_slices(vector, mean=stream[0], base=stream[1], limit=1 - multiple / self.hidden_size)
        widths = slice_widths(slices, self.hidden_size, multiple=multiple)
        if not options.inner_mean:
            return Target(kind, mean, base, slices, widths, calibration)
        alike = not options.mean and base == mean and kind != "equal-parameters"  # a plain checkpoint is possible
        neurons = inner_widths(vector, self.inner_sizes, mean=inner[0], base=inner[1], multiple=multiple, alike=alike)
        return Target(kind, mean, base, slices, widths, calibration, *inner, neurons)

    def highest_mean(self) -> float:
        """The largest SP of the sweep that all that is cut with it allows."""
        options, multiple = self.options, self.options.round_interval
        limits = []
        if options.mean:
            limits.append(1 - multiple / self.hidden_size)
        if options.inner_mean:
            part = options.inner_mean / options.swept
            limits.append(highest_inner_cut(self.inner_sizes, multiple) / part)
        return min(limits)
