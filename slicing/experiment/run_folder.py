"""A run's folder: each point in a file of its own, written in one step as it ends, and results.json made of them.

A file is found again by its key, a hash of all that its numbers depend on; so the same command goes on where it
stopped, a run takes over what another one beside it has measured (the dense model, at another mean), and a changed
setting never meets an old number.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

from slicing.experiment.results import Point, Results, Speed, Trial, VectorFile, check_results, read_results
from slicing.families import InputError
from slicing.files import read_json, remove_abandoned, write_json
from slicing.structure import as_json, from_json

Kept = TypeVar("Kept", Point, Speed, VectorFile, list[Trial])  # what a run keeps in files of its own
_PLACES: dict[object, str] = {
    Point: "points/{}.json",
    Speed: "speed-{}.json",
    VectorFile: "redundancy-{}.json",
    list[Trial]: "search-{}.json",
}


class RunFolder:
    """The files of one run below `folder`. InputError where it can't be written.

    fresh: forget what is there, and take nothing over from the runs beside it.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        try:
            if fresh:
                self._clear()
            check_writable(folder)
            for place in (folder, folder / "points", folder / "models"):
                remove_abandoned(place)
        except OSError as error:
            raise InputError(f"can't write to {folder}/ ({error.strerror}): choose another --output-dir") from error

    def read(self, kind: type[Kept], key: str) -> Kept | None:
        """What was written of this kind with this key, None where nothing was."""
        path = self._path(kind, key)
        return _content(path, kind, key) if path.exists() else None

    def take_over(self, kind: type[Kept], key: str) -> Kept | None:
        """The same, also from the runs beside this one: the newest file that is good is copied here."""
        path = self._path(kind, key)
        if path.exists() or self.fresh:
            return self.read(kind, key)
        beside: list[tuple[float, Path]] = []
        for file in self.folder.parent.glob(f"*/{path.relative_to(self.folder)}"):
            with contextlib.suppress(OSError):  # gone since
                beside.append((file.stat().st_mtime, file))
        for _, file in sorted(beside, reverse=True):
            with contextlib.suppress(InputError):
                content = _content(file, kind, key)
                self.write(kind, key, content)
                return content
        return None

    def write(self, kind: type[Kept], key: str, content: Kept) -> None:
        """Keep something under its key."""
        write_json(self._path(kind, key), as_json(content))

    def results(self) -> Results | None:
        """What results.json holds; None where it is not there or damaged."""
        try:
            return read_results(self.folder)
        except InputError:
            return None

    def write_results(self, results: Results) -> None:
        """Write results.json. InputError where they are not what their fields say."""
        check_results(results)
        write_json(self.folder / "results.json", as_json(results))

    def model(self, point: Point) -> Path:
        """Where the model of a sliced point is saved; the key tells models of one SB apart."""
        return self.folder / "models" / f"SB_{point.base:.4f}-{point.key[:8]}"

    def _path(self, kind: object, key: str) -> Path:
        return self.folder / _PLACES[kind].format(key)

    def _clear(self) -> None:
        for name in ("points", "models"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for pattern in ("results.*", "redundancy*", "search-*.json", "speed-*.json", "sweep.png"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)  # two runs may start over at once


def check_writable(folder: Path) -> None:
    """Make a folder; InputError where that or writing to it fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write to {folder}/ ({error.strerror}): choose another --output-dir") from error


def _content(path: Path, kind: type[Kept], key: str) -> Kept:
    """What a file of this kind holds. InputError where it is damaged, or a point is not one with this key."""
    try:
        content = from_json(read_json(path), kind, "point" if kind is Point else "")
        if isinstance(content, Point) and content.key != key:
            raise InputError(f"point.key is {content.key!r}: it must be {key!r}")
    except InputError as error:
        raise InputError(f"{error}: delete {path}, and it is measured again") from error
    return content
