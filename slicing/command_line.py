"""What the scripts have in common: a parser, exit codes, checks of single values."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from slicing.families import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no shortened flags and whose errors are one line on stderr; exit code 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def exit_code(run: Callable[[], None], interrupted: str) -> int:
    """Do a script's work: 0, 2 after one line on stderr for bad input, 130 after `interrupted` for Ctrl-C, and 1 where
    nobody reads the output any more."""
    try:
        run()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 1
    return 0


def at_least(limit: int, name: str, value: int | None) -> None:
    """InputError where a number is below its limit."""
    if value is not None and value < limit:
        raise InputError(f"--{name.replace('_', '-')} is {value}: it must be at least {limit}")


def check_seed(seed: int) -> None:
    """InputError for a seed that not every generator takes: NumPy's is the narrowest."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}: it must lie in [0, {2**32 - 1}]")


def check_output(flag: str, file: str | None, endings: tuple[str, ...]) -> None:
    """InputError where a file can't be written, or its ending is none of these. Leaves nothing behind."""
    if file is None:
        return
    path = Path(file)
    if path.suffix.lower() not in endings:
        raise InputError(f"{flag} is {file!r}: the name must end in {' or '.join(endings)}")
    try:
        if path.is_dir():
            raise InputError(f"{flag} is {file!r}, a folder: give the name of a file")
        if not path.absolute().parent.is_dir():
            raise InputError(f"the folder of {flag} {file!r} is not there: make it first")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"can't write {flag} {file!r} ({error.strerror}): choose another place") from error
