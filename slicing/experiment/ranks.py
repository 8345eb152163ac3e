"""One process or several: the ranks of torchrun or Slurm's srun share out the points of a sweep."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from slicing.families import InputError

T = TypeVar("T")
_MEET = timedelta(minutes=10)  # for all ranks to start
_WAIT = timedelta(days=2)  # for the slowest rank's points
_LOOK = 0.5  # seconds from one look at the others' points to the next


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run: `rank` of `count`, and its index `local` on this machine.

    Where another rank has ended early, `from_first` and `wait` raise InputError instead of waiting for it.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    group: Any = None  # PyTorch's process group, where there are several

    @property
    def first(self) -> bool:
        """Whether this process prints and reports."""
        return self.rank == 0

    def own_device(self, wanted: str) -> str:
        """The word for this rank's device: `auto` and `cuda` are a card of its own, as far as there are enough."""
        if self.count == 1 or wanted not in ("auto", "cuda"):
            return wanted
        import torch

        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else wanted

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of the items: every count-th."""
        return list(items[self.rank :: self.count])

    def from_first(self, value: T) -> T:
        """Rank 0's value, in every rank."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values: list[Any] = [value]
        with _lost_rank():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]  # type: ignore[no-any-return]

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until every rank has come here; `meanwhile` is called again and again."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with _lost_rank():
            arrived = dist.barrier(group=self.group, async_op=True)
        while not arrived.is_completed():  # true, too, where a rank is lost: then wait() raises
            meanwhile()
            time.sleep(_LOOK)
        with _lost_rank():
            arrived.wait()

    def leave(self) -> None:
        """End the process group."""
        if self.count > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


@contextmanager
def _lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, when a connection closes
        raise InputError("another rank of the run has ended: its own error says why") from error


def join_ranks() -> Ranks:
    """Join the processes that a launcher started with this one; a process of its own is rank 0 of 1.

    The process group is gloo's on any device: ranks exchange a few numbers, never tensors of the model. InputError for
    variables of a launcher that make no sense, and where other ranks don't come.
    """
    environment = os.environ
    try:
        if "RANK" not in environment:
            environment.update(_slurm_step(environment))
        count, local = (int(environment.get(name, value)) for name, value in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
        if count == 1:
            return Ranks()
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=_MEET)
        group = dist.new_group(backend="gloo", timeout=_WAIT)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:  # RuntimeError: the other ranks don't come
        wrong = " ".join(str(error).split())[:300]
        raise InputError(f"the ranks of the launcher can't meet ({wrong}): start with torchrun or srun") from error
    return Ranks(dist.get_rank(), count, local, group)


def _slurm_step(environment: Any) -> dict[str, str]:
    """torchrun's variables for a task that srun started, none elsewhere (in the batch script itself, say)."""
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if int(count) == 1:
        return {}
    # the first of "node[03-06,09],other", where rank 0 is
    prefix, number = re.findall(r"^([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])[0]
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": count,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", "localhost" if alone else prefix + number),
        "MASTER_PORT": environment.get("MASTER_PORT", str(15000 + int(environment["SLURM_JOB_ID"]) % 15000)),
    }
