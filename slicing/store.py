"""A run's folder: each point in a file of its own, written in one step as it ends, and results.json made of them.

A file is found again by its key, a hash of all that its numbers depend on; so the same command goes on where it
stopped, and a changed setting never meets an old number.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .families import InputError
from .results import Results


class RunFolder:
    """The files of one run below `folder`; `fresh` forgets what is there. InputError where it can't be written."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        try:
            if fresh:
                self._clear()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"can't write to {folder} ({error.strerror}): choose another --output-dir") from error

    def read(self, kind: str, key: str) -> Any:
        """What was written of this kind (point, redundancy or search) with this key, None where nothing was."""
        path = self._path(kind, key)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: delete it, and it is measured again") from error

    def write(self, kind: str, key: str, content: Any) -> None:
        """Keep something under its key."""
        write_json(self._path(kind, key), content)

    def write_results(self, results: Results) -> None:
        """Write results.json."""
        write_json(self.folder / "results.json", results)

    def model(self, base: float, key: str) -> Path:
        """Where the sliced model of a point is saved; the key tells models of one SB apart."""
        return self.folder / "models" / f"SB_{base:.4f}-{key[:8]}"

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / "points" / f"{key}.json" if kind == "point" else self.folder / f"{kind}-{key}.json"

    def _clear(self) -> None:
        for name in ("points", "models"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for pattern in ("results.*", "redundancy*", "search-*.json", "sweep.png"):
            for file in self.folder.glob(pattern):
                file.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that there is the old one or the new one at any moment, never a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror}): choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def content_key(content: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for a JSON object."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def windows_key(windows: torch.Tensor) -> str:
    """The same for token windows (N, S)."""
    shape = f"{tuple(windows.shape)}".encode()
    return hashlib.sha256(shape + windows.cpu().numpy().tobytes()).hexdigest()[:16]
