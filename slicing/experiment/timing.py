"""Seconds and peak memory of the parts of the work on a point."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slicing.experiment.results import Part, PeakMemory, Seconds


class Timing:
    """seconds: wall time by part. memory: the highest in it, of the process so far on a CPU. None: not run, or not
    known."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.memory = Seconds(None, None, None), PeakMemory(None, None, None)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """While this part of the work lasts."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        setattr(self.seconds, name, time.perf_counter() - start)
        setattr(self.memory, name, self._peak())

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu":
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
