"""Divides the images of a run among the processes of torchrun or of a SLURM array, and gathers their results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from acr_reg.integrations.jobs.meeting import Meeting

__all__ = ["Share", "process_device", "share_of_run"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process of ``world`` does: every ``world``-th item, from ``rank`` on.

    Without a ``meeting`` nobody hears of the other processes, as in a SLURM array: each reports its own share."""

    rank: int = 0
    world: int = 1
    meeting: Meeting | None = None

    def of(self, items: Sequence[T]) -> list[T]:
        """This process's items. The processes share none, and together have all."""
        return list(items[self.rank :: self.world])

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; without a meeting this one's alone. Waits for the slowest.

        Values travel as pickles. Raises RuntimeError if another process ended with an error."""
        return [value] if self.meeting is None else self.meeting.gather(value)

    @property
    def speaks(self) -> bool:
        """Whether this process writes what concerns the whole run."""
        return self.rank == 0 or self.meeting is None

    @property
    def is_apart(self) -> bool:
        """Whether other processes have shares of which this one never hears."""
        return self.world > 1 and self.meeting is None

    def __str__(self) -> str:
        return f"share {self.rank + 1} of {self.world}"


@contextmanager
def share_of_run(shared: bool = True) -> Iterator[Share]:
    """This process's share, by RANK and WORLD_SIZE as torchrun sets them. One process has everything, and so has each
    if ``shared`` is False.

    Processes with MASTER_ADDR, or with a process group of the caller, bring their results together. All of them must
    come, in the same order if there are several runs. Without MASTER_ADDR, as in a SLURM array, they hear nothing of
    each other.

    Raises:
        ValueError: RANK and WORLD_SIZE name no process of a run.
        RuntimeError: the other processes did not start this run within nine minutes.
    """
    if not shared:
        yield Share()
        return
    grouped = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else _place()
    if world == 1 or not (grouped or "MASTER_ADDR" in os.environ):
        yield Share(rank, world)
        return
    meeting = Meeting(rank, world)
    failed = True
    try:
        yield Share(rank, world, meeting)
        failed = False
    finally:
        meeting.leave(failed)


def process_device() -> torch.device:
    """The device of this process: ``cuda:LOCAL_RANK``, as torchrun numbers the processes of a machine, or the CPU where
    there is no CUDA. Without torchrun it is the current CUDA device.

    Raises ValueError if the machine has fewer GPUs than processes.

    >>> model = torch.nn.Linear(2, 2).to(process_device())
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, devices = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if local is None:
        return torch.device("cuda", torch.cuda.current_device())
    if not local.isdecimal() or int(local) >= devices:
        raise ValueError(
            f"LOCAL_RANK={local} is no GPU of this machine, which has {devices}. Start at most one process per GPU: "
            "torchrun --nproc-per-node."
        )
    return torch.device("cuda", int(local))


def _place() -> tuple[int, int]:
    """(RANK, WORLD_SIZE), or (0, 1) if neither is set."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    if rank is None or world is None:
        given, missing = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise ValueError(f"{given} is set in the environment and {missing} is not. Set both, or neither.")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} name no process of a run. RANK counts from 0 to WORLD_SIZE - 1."
        )
    return int(rank), int(world)
