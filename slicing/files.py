"""Files that are whole at any moment: the old one or the new one, never a part of it."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slicing.families import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, with the ending of `path`; it takes that file's place when this ends without an error.

    Raises InputError where the file system says no.
    """
    partial = path.with_name(f".{platform.node()}.{os.getpid()}.{path.name}")  # machines may share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror}): choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; ValueError for numbers that are not finite."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds. InputError where it can't be read, or is none; numbers that are not finite are none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
