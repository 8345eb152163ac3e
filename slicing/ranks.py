"""One process or several: the ranks of torchrun or Slurm's srun share out the points of a sweep."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_WAIT = timedelta(days=2)  # for the slowest rank's points


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run: `rank` of `count`, and its index `local` on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process prints and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of the items: every count-th."""
        return list(items[self.rank :: self.count])

    def from_first(self, value: T) -> T:
        """Rank 0's value, in every rank."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_ranks() -> Ranks:
    """Join the processes that a launcher started with this one; a process of its own is rank 0 of 1.

    The process group is gloo's on any device: ranks exchange a few numbers, never tensors of the model.
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
        environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "localhost"))
        environment.setdefault("MASTER_PORT", "29500")
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    dist.init_process_group("gloo", timeout=_WAIT)
    return Ranks(dist.get_rank(), count, int(environment.get("LOCAL_RANK", "0")))
