"""How the processes of one run meet and hear of each other: through torchrun's store, or the caller's process group."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, Protocol
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# A process waits this long for the others to start the run. NCCL ends a job in which a process waits ten minutes: if
# the others wait in a barrier of their training script, the error should come first.
WAIT_FOR_START = timedelta(minutes=9)
WAIT_FOR_END = timedelta(days=7)  # of a process that has done its share for the slowest one
SECONDS_BEFORE_NOTICE = 30.0

SECONDS_OF_SILENCE = 600.0  # after which a process counts as dead; its machine may be gone, too
SECONDS_BETWEEN_SIGNS = 20.0

_LOST = (RuntimeError, OSError)  # what torch raises for a peer that is gone; some versions raise TimeoutError
_SECONDS_TO_LEAVE = 60.0
_SECONDS_BETWEEN_LOOKS = 0.05
_LONGEST_VALUE = 4 * 2**20  # bytes; torch's store refuses values above 8 MiB


class Meeting(Protocol):
    """The processes of a run, after all have come."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. Waits for the slowest."""

    def leave(self, failed: bool) -> None:
        """Called once, at the end. After a failure the others learn of it and wait for nothing."""


class GroupMeeting:
    """Meets through a gloo group beside the caller's own process group, which may have any backend."""

    def __init__(self, rank: int, world: int) -> None:
        self.world = world
        with _waiting_for_all(world):
            group = dist.new_group(backend="gloo", timeout=WAIT_FOR_START)
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        try:
            dist.monitored_barrier(self.group, timeout=WAIT_FOR_END)
            dist.all_gather_object(values, value, group=self.group)
        except _LOST as error:
            raise RuntimeError(_ENDED_EARLY) from error
        return values

    def leave(self, failed: bool) -> None:
        dist.destroy_process_group(self.group)


class StoreMeeting:
    """Meets through the store at MASTER_ADDR and MASTER_PORT. It opens no process group: torch cannot open one twice
    under torchrun, and the caller may want to."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.numbers = count()
        with _waiting_for_all(world):
            self.store = _store(rank, world, os.getpid())
            self.session = self._meet()
        self.left = threading.Event()
        threading.Thread(target=self._show_life, daemon=True).start()

    def _meet(self) -> str:
        """The name of this run, new each time: the store may hold what earlier runs and killed processes left."""
        me, session, answered = uuid4().hex, uuid4().hex if self.rank == 0 else None, set[bytes]()
        self.store.set(f"acr_reg/hello/{self.rank}", me)
        end = time.monotonic() + WAIT_FOR_START.total_seconds()
        joined = False
        while time.monotonic() < end:
            if self.rank == 0:
                hellos = {self._look(f"acr_reg/hello/{rank}") for rank in range(self.world)} - {None} - answered
                for hello in hellos:
                    assert hello is not None and session is not None
                    self.store.set(f"acr_reg/session/{hello.decode()}", session)
                    answered.add(hello)
            elif session is None and (found := self._look(f"acr_reg/session/{me}")) is not None:
                session = found.decode()
            if session is not None:
                if not joined:
                    self.store.add(f"{session}/met", 1)
                    joined = True
                if self._look(f"{session}/met") == str(self.world).encode():
                    return session
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise RuntimeError("The others did not come.")

    def gather(self, value: Any) -> list[Any]:
        try:
            return self._gather(f"{self.session}/{next(self.numbers)}", pickle.dumps(value))
        except _LOST as error:  # the store is gone with the process that held it
            raise RuntimeError(_ENDED_EARLY) from error

    def _gather(self, key: str, data: bytes) -> list[Any]:
        parts = [data[start : start + _LONGEST_VALUE] for start in range(0, len(data), _LONGEST_VALUE)]
        for number, part in enumerate(parts):
            self.store.set(f"{key}/{self.rank}/{number}", part)
        self.store.set(f"{key}/{self.rank}", str(len(parts)))
        values = []
        for rank in range(self.world):
            seen, sign = time.monotonic(), None
            while (found := self._look(f"{key}/{rank}")) is None:
                if self._look(f"{self.session}/failed") is not None:
                    raise RuntimeError("A process reported a failure.")
                last, sign = sign, self._look(f"{self.session}/life/{rank}")
                seen = time.monotonic() if sign != last else seen
                if time.monotonic() - seen > SECONDS_OF_SILENCE:
                    raise RuntimeError(f"Process {rank} has shown no sign of life for {SECONDS_OF_SILENCE:g} seconds.")
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            whole = b"".join(self.store.get(f"{key}/{rank}/{number}") for number in range(int(found)))
            values.append(pickle.loads(whole))
        return values

    def _show_life(self) -> None:
        with suppress(*_LOST):  # the store is gone, which the next gather() tells
            while not self.left.wait(SECONDS_BETWEEN_SIGNS):
                self.store.add(f"{self.session}/life/{self.rank}", 1)

    def leave(self, failed: bool) -> None:
        self.left.set()
        with suppress(*_LOST):  # nobody is there any more
            if failed:
                self.store.set(f"{self.session}/failed", str(self.rank))
                return
            self.store.add(f"{self.session}/left", 1)
            # The store may live in the process of rank 0, and others still read.
            end = time.monotonic() + _SECONDS_TO_LEAVE
            while self.rank == 0 and self._look(f"{self.session}/left") != str(self.world).encode():
                if time.monotonic() > end:
                    return
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _look(self, key: str) -> bytes | None:
        """The value if there is one, at once: ``get`` would wait, and no signal ends that wait."""
        value = self.store.compare_set(key, "?", "?")  # changes nothing: no value is a question mark
        return None if value == b"?" else value


_ENDED_EARLY = "Another process of this run ended early, and its own error says why. Mend that, and run again."


@cache
def _store(rank: int, world: int, pid: int) -> Any:
    """Kept for the life of the process ``pid``: rank 0 may hold the store in its memory for all."""
    return next(rendezvous("env://", rank, world, timeout=WAIT_FOR_START))[0]


@contextmanager
def _waiting_for_all(world: int) -> Iterator[None]:
    """Says after a while what this process waits for, and words the error if the others do not come."""
    notice = threading.Timer(SECONDS_BEFORE_NOTICE, _say, [f"Waiting for all {world} processes to start this run."])
    notice.daemon = True
    notice.start()
    try:
        yield
    except _LOST as error:
        raise RuntimeError(
            f"Not all of the {world} processes started this run within {WAIT_FOR_START}. Call it in each of them, or "
            "pass share=False."
        ) from error
    finally:
        notice.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
