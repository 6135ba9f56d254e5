"""The one display of progress: bars on a terminal if rich is installed, else a line every ten seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, TextIO, cast

SECONDS_BETWEEN_LINES = 10.0


class Progress(NamedTuple):
    """``begin(what, total)`` announces a part of the job in ``total`` steps and returns the function to call after each
    of them. A part whose steps nobody counts has the total None; it lasts until the next part begins.

    ``note(text)`` writes a line that stays, above the bars if there are any.
    """

    begin: Callable[[str, int | None], Callable[[], None]]
    note: Callable[[str], None]


@contextmanager
def show_progress(shown: bool = True, bars: bool = True) -> Iterator[Progress]:
    """Shows progress on standard error: bars, or every ten seconds a line that says what is running. A standard error
    that is closed, or breaks on the way, does not end the job.

    With ``shown=False`` only the notes are written, and so in each process but the first of those that torchrun started
    (several bars on one terminal spoil each other). ``bars=False`` writes lines on a terminal too: bars take CPU time.
    Lines come from a thread of their own, so that a step of minutes is not silent. A shorter job writes none.
    """
    if not shown or not _is_first_process():
        yield Progress(lambda what, total: lambda: None, _write)
    elif bars and _shows_bars():
        with _bars() as progress:
            yield progress
    else:
        with _lines() as progress:
            yield progress


def _is_first_process() -> bool:
    """By the variables of torchrun. The processes of a SLURM array have no MASTER_ADDR, and a log each."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


# ---------------------------------------------------------------- standard error


class _StandardError:
    """Standard error, as it is now, as a file that drops what can no longer be written."""

    def __init__(self) -> None:
        self.stream: TextIO | None = sys.stderr  # None if the process was started without (2>&-)
        self.encoding = getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.stream is not None:
            with suppress(OSError, ValueError):  # the terminal or the reader of the pipe is gone; the file is closed
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with suppress(OSError, ValueError):
                self.stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()


def _write(text: str) -> None:
    stream = _StandardError()
    stream.write(f"{text}\n")
    stream.flush()


# ---------------------------------------------------------------- bars

_NARROW = 60  # columns of a terminal that has no room for a bar beside its counts


def _shows_bars() -> bool:
    if not _StandardError().isatty():
        return False
    try:
        import rich.progress  # noqa: F401
        from rich.console import Console
    except ModuleNotFoundError:
        return False
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal  # on others rich shows bars at their end, or never


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console
    from rich.table import Column

    console = Console(file=cast(TextIO, _StandardError()))
    name = Column(no_wrap=True, overflow="ellipsis", max_width=console.width // 2 - 2)
    columns: list[rich.ProgressColumn] = [
        rich.TextColumn("{task.description}", markup=False, table_column=name),
        rich.BarColumn(),
        rich.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        rich.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        rich.TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]
    if console.width < _NARROW:
        columns = [columns[0], columns[2], columns[4]]
    # What the job itself prints into a file or pipe stays there; rich would take it to the terminal.
    with rich.Progress(
        *columns, console=console, redirect_stdout=sys.stdout is not None and sys.stdout.isatty()
    ) as bars:
        uncounted: list[rich.TaskID] = []

        def begin(what: str, total: int | None) -> Callable[[], None]:
            end()
            task = bars.add_task(what, total=total)
            if total is None:
                uncounted.append(task)
            return lambda: bars.advance(task)

        def end() -> None:
            while uncounted:
                bars.update(uncounted.pop(), visible=False)

        def note(text: str) -> None:
            bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Progress(begin, note)
        end()


# ---------------------------------------------------------------- lines


@dataclass
class _Part:
    what: str
    total: int | None
    start: float
    done: int = 0

    def step(self) -> None:
        self.done += 1

    def __str__(self) -> str:
        spent = time.monotonic() - self.start
        if self.total is None:
            return f"{self.what}: {_duration(spent)} so far"
        if not self.done:
            return f"{self.what}: 0 of {self.total}, {_duration(spent)} so far"
        left = spent / self.done * (self.total - self.done)
        return f"{self.what}: {self.done} of {self.total}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def _lines() -> Iterator[Progress]:
    running: list[_Part] = []
    ended = threading.Event()

    def begin(what: str, total: int | None) -> Callable[[], None]:
        running[:] = [_Part(what, total, time.monotonic())]
        return running[0].step

    def write() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            for part in running:
                _write(str(part))

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield Progress(begin, _write)
    finally:
        ended.set()
        thread.join()
