"""How far a piece of work is: shown as a bar with its name, or told to whoever asked for the numbers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Report(Protocol):
    """Gets the name of a piece of work, how much of it is done, and of how many units; `done` may be a fraction."""

    def __call__(self, name: str, done: float, total: float, unit: str) -> None: ...


Progress = bool | Report  # a bar on stderr for each piece of work, nothing, or what a caller makes of the numbers


@contextmanager
def piece(progress: Progress, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """While this lasts, what is to be called with how much of the work is done, all in all."""
    if callable(progress):
        report = progress
        report(name, 0, total, unit)
        yield lambda done: report(name, done, total, unit)
        return
    with tqdm(total=total, desc=name, unit=unit, disable=not progress) as bar:
        yield lambda done: bar.update(int(done) - bar.n)


def counted(items: Iterable[T], progress: Progress, name: str, total: int, unit: str) -> Iterator[T]:
    """The items, each counted when the next one is asked for."""
    with piece(progress, name, total, unit) as at:
        for done, item in enumerate(items, 1):
            yield item
            at(done)
