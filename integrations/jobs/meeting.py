"""How the processes of one run meet and hear of each other: through the store of torchrun or of the caller's group."""

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
from typing import Any
from uuid import uuid4

from torch.distributed.rendezvous import rendezvous

from acr_reg.processes import store_of_process_group

# A process waits this long for the others to start the run. NCCL ends a job in which a process waits ten minutes: if
# the others wait in a barrier of their training script, the error should come first.
WAIT_FOR_START = timedelta(minutes=9)
SECONDS_BEFORE_NOTICE = 30.0

# A process that has done its share waits for the slowest without limit, unless that one is silent: torchrun ends the
# processes of its own machine alone, and a killed process of another one says nothing.
SECONDS_OF_SILENCE = 600.0
SECONDS_BETWEEN_SIGNS = 20.0

_LOST = (RuntimeError, OSError)  # what torch raises for a peer that is gone; some versions raise TimeoutError
_SECONDS_TO_LEAVE = 60.0
_SECONDS_BETWEEN_LOOKS = 0.05
_LONGEST_VALUE = 4 * 2**20  # bytes; torch's store refuses values above 8 MiB


class Meeting:
    """The processes of a run, after all have come. It opens no process group: torch cannot open one twice under
    torchrun, and the caller may want to. Nor would Ctrl-C end the wait of a group."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.numbers = count()
        with _waiting_for_all(world):
            self.store = _store(rank, world)
            self.run = self._meet()
        self.left = threading.Event()
        threading.Thread(target=self._show_life, daemon=True).start()

    def _meet(self) -> str:
        """A name for this run, made of a new word of each process. torchrun keeps the store when it starts processes
        again, and its count of restarts differs between machines: words of earlier runs and killed processes stay."""
        self._put(f"acr_reg/word/{self.rank}", uuid4().hex)
        run, end = "", time.monotonic() + WAIT_FOR_START.total_seconds()
        while time.monotonic() < end:
            words = [self._look(f"acr_reg/word/{rank}") for rank in range(self.world)]
            # Asked after the words are read: one who has met the others may have begun another run since.
            if run and self._count(f"{run}/met") == self.world:
                return run
            name = f"acr_reg/{b'-'.join(word for word in words if word).decode()}"
            if None not in words and name != run:
                run = name
                self.store.add(f"{run}/met", 1)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise RuntimeError("The others did not come.")

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. Waits for the slowest."""
        try:
            return self._gather(f"{self.run}/{next(self.numbers)}", pickle.dumps(value))
        except _LOST as error:  # the store is gone with the process that held it
            raise RuntimeError(
                "Another process of this run ended early, and its own error says why. Mend that, and run again."
            ) from error

    def _gather(self, key: str, data: bytes) -> list[Any]:
        parts = [data[start : start + _LONGEST_VALUE] for start in range(0, len(data), _LONGEST_VALUE)]
        for number, part in enumerate(parts):
            self.store.set(f"{key}/{self.rank}/{number}", part)
        self._put(f"{key}/{self.rank}", str(len(parts)))
        values = []
        for rank in range(self.world):
            seen, sign = time.monotonic(), -1
            while (found := self._look(f"{key}/{rank}")) is None:
                if self._count(f"{self.run}/failed"):
                    raise RuntimeError("A process reported a failure.")
                last, sign = sign, self._count(f"{self.run}/life/{rank}")
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
                self.store.add(f"{self.run}/life/{self.rank}", 1)

    def leave(self, failed: bool) -> None:
        """Called once, at the end. After a failure the others learn of it and wait for nothing."""
        self.left.set()
        with suppress(*_LOST):  # nobody is there any more
            if failed:
                self.store.add(f"{self.run}/failed", 1)
                return
            self.store.add(f"{self.run}/left", 1)
            # The store may live in the process of rank 0, and others still read.
            end = time.monotonic() + _SECONDS_TO_LEAVE
            while self.rank == 0 and self._count(f"{self.run}/left") != self.world:
                if time.monotonic() > end:
                    return
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _put(self, key: str, value: str) -> None:
        self.store.set(key, value)
        self.store.add(f"{key}/there", 1)

    def _look(self, key: str) -> bytes | None:
        """The value that :meth:`_put` has put, or None at once: ``get`` would wait, and no signal ends that wait."""
        value: bytes | None = self.store.get(key) if self._count(f"{key}/there") else None
        return value

    def _count(self, key: str) -> int:
        """What ``add`` has added up so far: of what a store can do in every torch, this alone never waits."""
        return int(self.store.add(key, 0))


def _store(rank: int, world: int) -> Any:
    return store_of_process_group() or _store_at_master(rank, world, os.getpid())


@cache
def _store_at_master(rank: int, world: int, pid: int) -> Any:
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
