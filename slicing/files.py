"""Paths as users write them, and files and folders that are whole at any moment: the old or the new, never a part."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slicing.families import InputError

_NAME_LENGTH = 60  # characters kept of a name, at its end: with machine and process it stays a possible name


def local_path(name: str) -> Path:
    """A name as a path, with `~` the home folder. Raises InputError for one that no file or folder can have."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a user that is not there; a null byte
        raise InputError(f"{name[:80]!r} can't be a file or folder: {getattr(error, 'strerror', error)}") from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, with the ending of `path`; it takes that file's place when this ends without an error.

    Raises InputError where the file system says no.
    """
    partial = _own(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"can't write {path} ({error.strerror}): choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextmanager
def new_folder(folder: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder of this process's own to write to; it becomes `folder` when this ends without an error.

    Where another process has made `folder` meanwhile and `is_whole` says yes to it, that one stays; one that is not
    whole is replaced. Nothing half written is left. Raises OSError where the file system says no.
    """
    partial, old = _own(folder), _own(folder.with_name(f"{folder.name}.old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an earlier process with this number
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        while not is_whole(folder):
            try:
                partial.rename(folder)
                break
            except OSError:
                if not folder.exists():
                    raise
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes of this machine that are no more had begun to write in a folder, and never finished."""
    pattern = re.compile(rf"\.{re.escape(_machine())}\.(\d+)\.")
    with contextlib.suppress(OSError):  # no such folder; removed by another run
        for path in folder.iterdir():
            found = pattern.match(path.name)
            if found is None or _is_running(int(found[1])):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _own(path: Path) -> Path:
    """A hidden name beside a path, with its ending, that no other process has: machines may share the folder."""
    return path.with_name(f".{_machine()}.{os.getpid()}.{path.name[-_NAME_LENGTH:]}")


def _machine() -> str:
    """What process numbers are unique in: the machine, or a container on it."""
    try:
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # the name is from before: this process is only about to write
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file. InputError where the file system says no, and for a number that is not finite, by place."""
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(f"can't write {path}: {_not_finite(content)} is no finite number") from error
    with replacing(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def _not_finite(content: Any, place: str = "") -> str | None:
    """The first number that is not finite: its place and what it is."""
    if isinstance(content, float) and not math.isfinite(content):
        return f"{place} ({content})"
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = (_not_finite(part, f"{place}[{name!r}]") for name, part in parts)
    return next(filter(None, found), None)


def read_json(path: Path) -> Any:
    """What a JSON file holds. InputError where it can't be read, or is none; numbers beyond a double are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_number)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(digits: str) -> int:
    _number(digits)
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]}{'...' * (len(digits) > 20)} is beyond the largest number, 1.8e308")
    return number
