"""One bar for the points of a run: which point and part is under way, how far it is, and how long the rest takes."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

_LOOK = 1.0, 3.0  # seconds from one drawing to the next, on a terminal and in a file


class RunBar:
    """A `Report` that draws a line on stderr, also while nothing is reported: a clock shows that the work goes on.

    parts: for each point the names of its parts, in order. What is left is told by how long the same parts took last;
    while one is new, by how far it is, and where one has not begun it is unknown.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[str]],
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        look: float | None = None,
        file: TextIO | None = None,
    ) -> None:
        self._parts, self._clock = [list(names) for names in parts], clock
        self._file = file or sys.stderr
        on_terminal = bool(getattr(self._file, "isatty", bool)())  # a stream that stands for stderr may lack it
        self._look = look or _LOOK[not on_terminal]
        self._bar = tqdm(
            total=1.0,
            bar_format="{bar:12} {desc}",
            file=self._file,
            disable=not shown,
            leave=not on_terminal,  # in a file what comes after it stands in a line of its own
            dynamic_ncols=True,
        )
        self._seconds: dict[str, float] = {}  # of the last part with this name
        self._begun, self._drawn = clock(), 0.0
        self._place, self._label = -1, ""
        self._part, self._part_begun = "", 0.0
        self._work, self._done = "", 0.0  # in words; as a fraction of it
        self._ended = threading.Event()
        self._clockwork = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if not self._bar.disable:
            self._clockwork.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._clockwork.is_alive():
            self._clockwork.join()
        self._bar.close()

    def point(self, label: str) -> None:
        """The next point begins."""
        self._place, self._label = self._place + 1, label
        self._part = self._work = ""
        self._draw()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the point, while it lasts."""
        self._part, self._part_begun = name, self._clock()
        self._work, self._done = name, 0.0
        self._draw()
        yield
        self._seconds[name] = self._clock() - self._part_begun
        self._parts[self._place].remove(name)
        self._part = ""

    def __call__(self, name: str, done: float, total: float, unit: str) -> None:
        """How far a piece of work within the part is."""
        self._work = f"{name} {done:.0f}/{total:.0f} {unit}s"
        self._done = done / total if total else 0.0
        if self._clock() - self._drawn >= 0.1 * self._look:
            self._draw()

    def left(self) -> float | None:
        """Seconds until the last point ends; None while they can't be told."""
        known, part = dict(self._seconds), self._part  # the clock asks from another thread
        gone = self._clock() - self._part_begun
        if part and part not in known and self._done > 0:
            known[part] = gone / self._done
        waiting = [name for names in self._parts[max(0, self._place) :] for name in names]
        if any(name not in known for name in waiting):
            return None
        whole = sum(known[name] for name in waiting)
        return whole - min(gone, known.get(part, 0.0), whole) if part else whole

    def text(self) -> str:
        """The line, without the bar."""
        left = self.left()
        where = f"point {self._place + 1} of {len(self._parts)}, {self._label}"
        work = f": {self._work}" if self._work else ""
        rest = "time left not known yet" if left is None else f"{tqdm.format_interval(left)} left"
        return f"{where}{work}; {tqdm.format_interval(self._clock() - self._begun)} gone, {rest}"

    def _draw(self) -> None:
        if self._bar.disable:
            return
        self._drawn = self._clock()
        gone, left = self._drawn - self._begun, self.left()
        by_count = max(0, self._place) / max(1, len(self._parts))
        self._bar.n = by_count if left is None else gone / max(gone + left, 1e-9)
        self._bar.set_description_str(self.text(), refresh=False)
        self._bar.refresh()

    def _tick(self) -> None:
        while not self._ended.wait(self._look):
            if self._place >= 0:
                self._draw()
