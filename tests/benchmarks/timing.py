"""Seconds of the parts of a piece of work, what it ran on, and the tables of the benchmarks."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from slicing.speed import timed


@contextmanager
def timed_parts(device: torch.device, parts: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, float]]:
    """Seconds spent in functions while this lasts: name of a part -> (owner, attribute) of its functions.

    The device is waited for before and after each call, so that what overlaps elsewhere is told apart here.
    """
    seconds = dict.fromkeys(parts, 0.0)

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            elapsed, result = timed(device, lambda: function(*args, **kwargs))
            seconds[name] += elapsed
            return result

        return call

    with ExitStack() as stack:
        for name, places in parts.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, measured(name, getattr(owner, attribute))))
        yield seconds


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": None if cuda else torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def print_heading(model: PreTrainedModel, shape: str, where: dict[str, Any]) -> None:
    """One line: the model, the card, the versions."""
    config = model.config
    threads = "" if where["threads"] is None else f" ({where['threads']} threads)"
    print(
        f"{shape}: {config.num_hidden_layers} layers, D {config.hidden_size}, {str(model.dtype).removeprefix('torch.')}"
        f", {config._attn_implementation}, random weights; {where['device']}{threads}, torch {where['torch']}, "
        f"Transformers {where['transformers']}",
        flush=True,
    )


class Table:
    """A Markdown table on stdout. A row is printed when it is known, so a run that is cut short leaves its rows."""

    def __init__(self, first: str, *columns: str, width: int = 26) -> None:
        self.widths = [width, *(max(9, len(name)) for name in columns)]
        print()
        self.row(first, *columns)
        print(f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (cell + 1)}:|" for cell in self.widths[1:]))

    def row(self, first: str, *cells: str | float | None) -> None:
        """A number is shown with three decimals, None as a dash."""
        texts = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells]
        padded = [first.ljust(self.widths[0]), *map(str.rjust, texts, self.widths[1:])]
        print(f"| {' | '.join(padded)} |", flush=True)
