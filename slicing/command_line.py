"""What the scripts have in common: a parser, output to the terminal, exit codes, checks of single values."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from slicing.families import InputError
from slicing.files import local_path


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no shortened flags and whose errors are one line on stderr; exit code 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def path(text: str) -> str:
    """A path on the command line, `~` expanded: the shell leaves it as it is in --output-dir=~/x."""
    try:
        return str(local_path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Screen:
    """Lines on stdout, with what the terminal can show. Where nobody reads any more, the work goes on."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def show(self, line: str) -> None:
        """Print a line at once."""
        if self.error is None:
            try:
                print(_in_coding(line, sys.stdout.encoding), flush=True)
            except OSError as error:  # a closed pipe or terminal, a full disk
                self.error = error

    def close(self) -> None:
        """Say that lines were not printed: BrokenPipeError, or InputError with the reason."""
        if self.error is not None:
            _drop(sys.stdout)
            if isinstance(self.error, BrokenPipeError):
                raise self.error
            why = f"stdout can't be written ({self.error.strerror})"
            raise InputError(
                f"{why}: what goes into files is there, and the same command prints it again"
            ) from self.error


class _Stderr:
    """stderr as long as somebody reads it: what can't be written is dropped, and no bar or note ends the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
        except OSError:  # a closed pipe or terminal, a full disk
            _drop(self._stream)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Make stdout and stderr be there, and stderr one that never fails."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller (`>&-`): the next file that is opened would get what others print
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (open(os.devnull, "w") if stream is None else stream for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = out, _Stderr(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _in_coding(line: str, coding: str | None) -> str:
    """A line in what a terminal's coding has, as wide as before."""
    for sign, plain in (("\N{SPACE}\N{PLUS-MINUS SIGN}", "+-"), ("\N{HORIZONTAL ELLIPSIS}", "~")):
        if not _can_show(sign, coding):
            line = line.replace(sign, plain)
    return line if _can_show(line, coding) else line.encode(coding or "ascii", "replace").decode(coding or "ascii")


def _can_show(text: str, coding: str | None) -> bool:
    try:
        text.encode(coding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _drop(stream: Any) -> None:
    """Send what is written from now on, and what Python flushes at its end, nowhere."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(run: Callable[[], None], interrupted: str) -> int:
    """Do a script's work: 0, 2 after one line on stderr for bad input, 130 after `interrupted` for Ctrl-C, 128 and the
    signal's number after it for a closed terminal or an end from outside, and 1 where nobody reads the output."""
    with _streams():
        return _exit_code(run, interrupted)


def _exit_code(run: Callable[[], None], interrupted: str) -> int:
    ended_by = []

    def end(number: int, _: object) -> None:
        ended_by.append(number)
        raise KeyboardInterrupt  # what was begun is cleared away

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup's stays
                before[number] = signal.signal(number, end)
    try:
        run()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:  # of a checkpoint's or a task's own code: the scripts have none
        print(f"error: code of the model's or a task's own ended the program ({error.code!r})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + (ended_by[0] if ended_by else signal.SIGINT)
    except BrokenPipeError:
        _drop(sys.stdout)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


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
