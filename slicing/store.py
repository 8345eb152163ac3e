"""A run's folder: each point in a file of its own, written in one step as it ends, and results.json made of them.

A point is found again by its key, a hash of all that its numbers depend on; so the same command goes on where it
stopped, and a changed setting never meets an old number.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .families import InputError
from .results import Point, Results


class RunFolder:
    """The files of one run below `folder`. Raises InputError where the folder can't be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points = folder / "points"
        try:
            self.points.mkdir(parents=True, exist_ok=True)
            probe = self.points / f".probe{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"can't write to {folder} ({error.strerror}): choose another --output-dir") from error

    def clear(self) -> None:
        """Forget the run's points and models."""
        for name in ("points", "models"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.points.mkdir()

    def read(self, key: str) -> Point | None:
        """The point with this key, or None where it is not finished."""
        path = self.points / f"{key}.json"
        if not path.exists():
            return None
        point: Point = json.loads(path.read_text(encoding="utf-8"))
        return point

    def write(self, point: Point) -> None:
        """Keep a finished point."""
        write_json(self.points / f"{point['key']}.json", point)

    def write_results(self, results: Results) -> None:
        """Write results.json."""
        write_json(self.folder / "results.json", results)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that there is the old one or the new one at any moment, never a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror}): choose another place") from error


def content_key(content: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for a JSON object."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def windows_key(windows: torch.Tensor) -> str:
    """The same for token windows (N, S)."""
    shape = f"{tuple(windows.shape)}".encode()
    return hashlib.sha256(shape + windows.cpu().numpy().tobytes()).hexdigest()[:16]
