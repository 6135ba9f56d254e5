"""A KeyboardInterrupt at every line of the library that a scenario runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import acr_reg

T = TypeVar("T")
Line = tuple[str, int]

PACKAGE = Path(acr_reg.__file__).parent
EVERY_LINE = os.environ.get("ACR_REG_EVERY_LINE") == "1"  # whatever the step of a test
LIBRARY = frozenset(str(path) for path in PACKAGE.rglob("*.py"))


def files_of(*rooms: str) -> frozenset[str]:
    """The files of these rooms or files of the package, such as "capture" or "cam/inference.py"."""
    chosen = {str(path) for room in rooms for path in [PACKAGE / room, *(PACKAGE / room).rglob("*.py")]}
    return LIBRARY & chosen


def each_interrupt(
    begin: Callable[[], T],
    act: Callable[[T], object],
    files: Container[str] = LIBRARY,
    step: int = 1,
    holds: bool = True,
) -> Iterator[tuple[T, str]]:
    """Yields (what ``begin`` made, the line) after an interrupt in ``act`` of it: at each line of ``files`` when it is
    first reached, and at each when it is last reached.

    ``step`` tries every so many lines, unless ACR_REG_EVERY_LINE=1 asks for all. ``holds``: the traceback, and with it
    every frame and object of the interrupted call, stays alive until the next interrupt, as in a notebook; else it is
    dropped first.
    """
    act(begin())  # fills caches, so that later calls reach the same lines
    gc.collect()  # what earlier calls and tests left would be walked over in the first run alone
    every = moments(partial(act, begin()), files)
    assert every, "no line of the library was reached"
    for moment in every[:: 1 if EVERY_LINE else step]:
        made = [begin()]
        where, error = interrupt(moment, partial(act, made[0]), files)
        if not holds:
            error = None
        yield made.pop(), where  # so that the caller may drop it
        del error


def moments(scenario: Callable[[], object], files: Container[str] = LIBRARY) -> list[int]:
    """When to interrupt, counted in lines: where each line is reached for the first time, and for the last."""
    reached: list[Line] = []
    with _at_each_line(reached.append, files):
        scenario()
    first = {line: i for i, line in reversed(list(enumerate(reached)))}
    last = {line: i for i, line in enumerate(reached)}
    return sorted({*first.values(), *last.values()})


def interrupt(
    moment: int, scenario: Callable[[], object], files: Container[str] = LIBRARY
) -> tuple[str, KeyboardInterrupt | None]:
    """Runs the scenario with an interrupt at this moment. Returns the line, and the error with its traceback: None in a
    finalizer, where Python itself swallows it."""
    count, where = -1, ""
    swallowed: list[Any] = []

    def stop(line: Line) -> None:
        nonlocal count, where
        count += 1
        if count == moment:
            where = f"{Path(line[0]).relative_to(PACKAGE)}:{line[1]}"
            raise KeyboardInterrupt

    before, sys.unraisablehook = sys.unraisablehook, lambda raised: swallowed.append(raised.exc_type)
    try:
        with _at_each_line(stop, files):
            scenario()
    except KeyboardInterrupt as error:
        return where, error
    finally:
        sys.unraisablehook = before
    assert where, f"Line number {moment} was not reached."
    assert swallowed == [KeyboardInterrupt], f"The interrupt at {where} was swallowed."
    return where, None


@contextmanager
def _at_each_line(act: Callable[[Line], None], files: Container[str]) -> Iterator[None]:
    """Calls ``act`` before each line of ``files`` that this thread reaches."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            act((frame.f_code.co_filename, frame.f_lineno))
        return local

    collects, before = gc.isenabled(), sys.gettrace()
    gc.disable()  # a collection would run finalizers at other lines each time
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
