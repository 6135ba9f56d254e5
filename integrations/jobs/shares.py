"""Divides the images of a run among the processes of torchrun or of a SLURM array, and brings their results together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=7)  # of a process that has finished its share for the slowest one


@dataclass(frozen=True)
class Share:
    """What one process of ``world`` does: every ``world``-th item, from ``rank`` on.

    Without a ``group`` nobody hears of the other processes, as in a SLURM array: each reports its own share."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    def of(self, items: Sequence[T]) -> list[T]:
        """This process's items. The processes share none, and together have all."""
        return list(items[self.rank :: self.world])

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; without a group this one's alone. Waits for the slowest."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    @property
    def speaks(self) -> bool:
        """Whether this process writes what concerns the whole run."""
        return self.rank == 0 or self.group is None


@contextmanager
def share_of_run(shared: bool = True) -> Iterator[Share]:
    """This process's share, by RANK and WORLD_SIZE as torchrun sets them; everything if they are not set or ``shared``
    is False. Processes with MASTER_ADDR, or with a process group of the caller, bring their results together."""
    if not shared:
        yield Share()
        return
    if dist.is_available() and dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        try:
            yield Share(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or "MASTER_ADDR" not in os.environ:
        yield Share(rank, world)
        return
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield Share(rank, world, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
