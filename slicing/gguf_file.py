"""A GGUF file read once for all that is made of it: Transformers reads it for the config, and again for the weights."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """While this lasts, a file that was read before, and has not changed since, is not read again."""
    try:
        import gguf
    except ImportError:  # Transformers says so
        yield
        return
    reader = gguf.GGUFReader

    def known(path: Any, mode: str = "r") -> Any:
        if mode != "r":
            return reader(path, mode)
        found = os.stat(path)
        return _read(reader, os.fspath(path), found.st_size, found.st_mtime_ns)

    gguf.GGUFReader = known
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@functools.lru_cache(maxsize=1)
def _read(reader: Callable[[Any], Any], path: str, size: int, changed: int) -> Any:
    """What is kept are views of the mapped file, which take next to no memory."""
    return reader(path)
