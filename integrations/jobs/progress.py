"""The one progress bar: bars where standard error is a terminal and rich is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SECONDS_BETWEEN_LINES = 10.0


class Progress(NamedTuple):
    """``begin(what, total)`` announces ``total`` steps and returns the function to call after each of them.

    ``note(text)`` writes a line that stays, above the bars if there are any.
    """

    begin: Callable[[str, int], Callable[[], None]]
    note: Callable[[str], None]


@contextmanager
def show_progress(shown: bool = True) -> Iterator[Progress]:
    """Shows progress on standard error. With ``shown=False`` only the notes are written."""
    if not shown:
        yield Progress(lambda what, total: lambda: None, _write)
    elif sys.stderr.isatty() and _rich_is_installed():
        with _bars() as progress:
            yield progress
    else:
        yield Progress(_Lines().begin, _write)


def _write(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rich_is_installed() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:

        def begin(what: str, total: int) -> Callable[[], None]:
            task = bars.add_task(what, total=total)
            return lambda: bars.advance(task)

        def note(text: str) -> None:
            bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Progress(begin, note)


class _Lines:
    """For logs: at most one line every few seconds, so a short run writes none."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def begin(self, what: str, total: int) -> Callable[[], None]:
        start, done = time.monotonic(), 0

        def step() -> None:
            nonlocal done
            done += 1
            now = time.monotonic()
            if now - self.last >= SECONDS_BETWEEN_LINES:
                self.last = now
                left = (now - start) / done * (total - done)
                _write(f"{what}: {done} of {total}, about {left:.0f} s left")

        return step
