"""Saves files beside the work that makes the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

WAITING_AT_MOST = 4  # results in memory that are not saved yet
THREADS = 4  # a disk takes as long to keep several files for good as to keep one


class Saver:
    """Runs saves in threads. Each ends, in the order they came, by a call of its ``then`` in the caller's thread, with
    the ValueError that it raised, or None; any other error is raised there and ends the run."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.failed = False
        self.waiting: deque[tuple[Future[None], Callable[[ValueError | None], None]]] = deque()

    def save(self, write: Callable[[], None], then: Callable[[ValueError | None], None]) -> None:
        """Returns before the file is written, unless too many wait."""
        self.waiting.append((self.threads.submit(write), then))
        while len(self.waiting) > WAITING_AT_MOST or (self.waiting and self.waiting[0][0].done()):
            self._end_first()

    def finish(self) -> None:
        while self.waiting:
            self._end_first()

    def _end_first(self) -> None:
        future, then = self.waiting[0]
        error = future.exception()  # an interruption of this wait leaves it in the queue
        if error is not None and not isinstance(error, ValueError):
            self.failed = True
            raise error
        self.waiting.popleft()
        then(error)

    def end_saved(self) -> None:
        """Ends those that were saved beside the one that failed."""
        for future, then in self.waiting:
            if future.done() and not future.cancelled() and future.exception() is None:
                then(None)


@contextmanager
def saving() -> Iterator[Saver]:
    """On an interruption, what is made is still saved. On an error of a save, the saves after it are given up."""
    threads = ThreadPoolExecutor(THREADS, "saving")
    saver = Saver(threads)
    try:
        yield saver
        saver.finish()
    except BaseException:
        threads.shutdown(cancel_futures=saver.failed)
        if saver.failed:
            saver.end_saved()
        raise
    finally:
        threads.shutdown()
