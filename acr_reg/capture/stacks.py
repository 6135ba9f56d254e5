"""What the stacks of threads tell: which forwards are running, and in which generators and tasks."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import Any

from torch import nn

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def stack_of(thread: int) -> Iterator[FrameType]:
    """The frames of a thread, innermost first; none once it has ended."""
    frame = sys._getframe(1) if thread == threading.get_ident() else _innermost_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost_frames() -> dict[int, FrameType]:
    """The innermost frame of each thread.

    ``sys._current_frames`` holds a lock that a garbage collection within it waits for, for ever. So none may begin in
    it. The three calls are one step of C code, which no interruption and no other thread divides. The frames have no
    name here: this function's own is among them, and would hold itself and all that its callers hold.
    """
    if not gc.isenabled():
        return sys._current_frames()
    steps: tuple[Iterator[Any], ...] = (iter(gc.disable, 0), iter(sys._current_frames, 0), iter(gc.enable, 0))
    return list(map(next, steps))[1]


def is_running(frame: FrameType) -> bool:
    """Whether the frame is still on this thread's stack. A KeyboardInterrupt skips even always-called hooks."""
    current: FrameType | None = sys._getframe(1)
    while current is not None:  # a loop of its own, because each hook asks
        if current is frame:
            return True
        current = current.f_back
    return False


def is_running_on(thread: int, frame: FrameType) -> bool:
    """Whether the frame is still on that thread's stack."""
    return any(other is frame for other in stack_of(thread))


def suspendable_callers(frame: FrameType) -> tuple[FrameType, ...]:
    """The generators and coroutines that run this frame, outermost first. Each may be suspended between forwards."""
    found, above = [], frame.f_back
    while above is not None:
        if above.f_code.co_flags & _SUSPENDABLE:
            found.append(above)
        above = above.f_back
    return tuple(reversed(found))


class RunningForwards:
    """The forwards of these modules that threads are in the middle of.

    Those of other threads that had begun when this was made are remembered: their first layers were not seen.
    """

    def __init__(self, modules: Container[nn.Module]) -> None:
        self._modules = modules
        self._begun_before = self._elsewhere()

    def here(self, counts: Callable[[nn.Module], bool]) -> nn.Module | None:
        """The outermost module that counts and whose forward this thread is in."""
        call = self._outermost_call(threading.get_ident(), counts)
        return None if call is None else call.f_locals["self"]

    def is_elsewhere(self) -> bool:
        """Whether another thread is in a forward."""
        return bool(self._elsewhere())

    def is_inside(self, thread: int) -> bool:
        """Whether that thread is in a method of one of the modules, as in one that runs blocks one by one."""
        owners = (frame.f_locals.get("self") for frame in stack_of(thread))
        return any(isinstance(owner, nn.Module) and owner in self._modules for owner in owners)

    def began_before(self) -> bool:
        """Whether this thread is still in a forward that had begun before."""
        if not self._begun_before:
            return False
        thread = threading.get_ident()
        if thread in self._begun_before and not is_running(self._begun_before[thread]):
            del self._begun_before[thread]
        return thread in self._begun_before

    def _elsewhere(self) -> dict[int, FrameType]:
        calls = {thread: self._outermost_call(thread) for thread in _innermost_frames()}
        return {t: call for t, call in calls.items() if call is not None and t != threading.get_ident()}

    def _outermost_call(self, thread: int, counts: Callable[[nn.Module], bool] = lambda _: True) -> FrameType | None:
        found = None
        for frame in stack_of(thread):
            if frame.f_code is nn.Module.__call__.__code__:
                module = frame.f_locals["self"]
                found = frame if module in self._modules and counts(module) else found
        return found
