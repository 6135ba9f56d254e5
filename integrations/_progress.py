"""How far a long run is: a bar where standard error is a terminal and rich is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SECONDS_BETWEEN_LINES = 10.0


class Progress(NamedTuple):
    """``step()`` counts one more; ``note(text)`` writes a line that stays, above the bar if there is one."""

    step: Callable[[], None]
    note: Callable[[str], None]


@contextmanager
def show_progress(what: str, total: int, shown: bool = True) -> Iterator[Progress]:
    """Progress of ``total`` steps on standard error; with ``shown`` False only the notes are written."""
    if not shown:
        yield Progress(lambda: None, _write)
    elif sys.stderr.isatty() and _rich_is_installed():
        with _bar(what, total) as progress:
            yield progress
    else:
        yield Progress(_Lines(what, total).step, _write)


def _write(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rich_is_installed() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def _bar(what: str, total: int) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def note(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Progress(lambda: bar.advance(task), note)


class _Lines:
    """For logs: at most a line every few seconds, so that a short run writes none."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.last = time.monotonic()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            _write(f"{self.what}: {self.done} of {self.total}, about {left:.0f} s left")
