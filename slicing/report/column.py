"""A column of the table; which are printed by name, and which are left out where a terminal is narrow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slicing.experiment.results import Point, Results
from slicing.families import InputError

Cell = Callable[[Point, Results], str]
GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of the table.

    name: for --columns. titles: two lines. width: in characters, negative where the text stands at the left.
    shown: whether it is there unless columns are chosen. rank: which is left out first where a terminal is narrow, the
    highest; 0 never.
    """

    name: str
    titles: tuple[str, str]
    width: int
    cell: Cell
    shown: bool = True
    rank: int = 0

    @property
    def title(self) -> str:
        """Both lines as one."""
        first, second = self.titles
        return first[:-1] + second if first.endswith("-") else f"{first} {second}".strip()

    def pad(self, text: str) -> str:
        """Text as wide as the column."""
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def chosen(columns: Sequence[Column], names: Sequence[str] | None) -> list[Column]:
    """The columns with these names, in their order; None: those that are shown unless others are asked for."""
    if names is None:
        return [column for column in columns if column.shown]
    by_name = {column.name: column for column in columns}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise InputError(f"there is no column {unknown[0]!r}: the columns are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def fitting(columns: Sequence[Column], width: int | None) -> tuple[list[Column], list[Column]]:
    """The columns that fit in so many characters, and those left out for it, the least important first."""
    left, out = list(columns), []
    while width is not None and sum(abs(one.width) for one in left) + len(GAP) * (len(left) - 1) > width:
        last = max(left, key=lambda column: (column.rank, left.index(column)))
        if last.rank == 0:
            break
        left.remove(last)
        out.append(last)
    return left, out


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
