"""Hooks that tell a watcher which module of a model is running, on any thread.

A hook holds only a number, so a deleted watcher is never called. A copy of the model has no hooks. In a pickle a
function of the standard library that does nothing stands in their place: it runs, and loads, without this package.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import count
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from acr_reg._torch_private import break_graph, in_backward, is_compiling, remove_hooks
from acr_reg.capture.stacks import is_running
from acr_reg.errors import CaptureError


class Watcher(Protocol):
    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None: ...

    def left(self, module: nn.Module, result: Any, failed: bool) -> None: ...


_WATCHERS: dict[int, weakref.ref[Watcher]] = {}
_NUMBERS = count()
_TRACED = (
    "{} is tracing a captured model, which cannot be traced. Run it uncompiled, or remove the capture before tracing."
)


def _watcher(number: int) -> Watcher | None:
    """The watcher, if it is alive and hears what now runs on this thread."""
    reference = _WATCHERS.get(number)
    return None if reference is None or (_solo.blocks and not _solo.admits(number)) else reference()


class _ScriptingError(CaptureError, AttributeError):
    """Also an AttributeError, so that hasattr(hook, "__name__") is False."""


class _Hook:
    """Holds its watcher's number, which copies and pickles do not inherit."""

    def __init__(self, number: int, module: nn.Module) -> None:
        self.number = number
        self._module = weakref.ref(module)

    @property
    def __name__(self) -> str:  # only torch.jit.script reads it
        raise _ScriptingError(_TRACED.format("torch.jit.script"))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything and returns None, as a hook that does nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module()))  # while its attributes are copied
        if copied is not None:
            memo.setdefault(id(_Copies), _Copies()).modules.append(copied)
        return nullcontext().__exit__


class _Copies:
    """Copies of hooked modules. They lose what stands in the place of hooks once the whole model is copied: then the
    memo of the copying, and this with it, is dropped."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __del__(self) -> None:
        for module in self.modules:
            remove_hooks(module, lambda hook: getattr(hook, "__func__", None) is nullcontext.__exit__)


class _EnterHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if is_compiling():  # before anything that tracing cannot follow
            message = _TRACED.format("torch.compile or torch.export")
            break_graph(message)
            raise CaptureError(message)
        watcher = _watcher(self.number)
        if watcher is None or kwargs is None:  # while another thread removes this hook, torch passes no kwargs
            return
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise CaptureError(_TRACED.format("torch.jit.trace"))
        watcher.entered(module, args, kwargs, sys._getframe(1))


class _LeaveHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        watcher = None if is_compiling() else _watcher(self.number)
        if watcher is not None:
            # If the forward raised, torch calls this while it handles the exception, with None as the result.
            watcher.left(module, result, failed=result is None and sys.exc_info()[1] is not None)


class HookSet:
    """The hooks of one watcher; they end with :meth:`remove` or with the watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.number = next(_NUMBERS)
        self._hooked: dict[nn.Module, None] = {}
        # The finalizer must not hold the watcher, which holds this set.
        self._finalizer = weakref.finalize(watcher, _remove_all, self._hooked, self.number)
        _WATCHERS[self.number] = weakref.ref(watcher)

    @property
    def is_heard(self) -> bool:
        """Whether the watcher hears what now runs on this thread: not once removed, nor while another runs alone."""
        return _watcher(self.number) is not None

    def is_watched(self, module: nn.Module) -> bool:
        return module in self._hooked

    def watch_only(self, modules: Iterable[nn.Module]) -> None:
        """Hooks these modules and no others."""
        wanted = dict.fromkeys(modules)
        _remove_from([module for module in list(self._hooked) if module not in wanted], self._hooked, self.number)
        for module in wanted:
            if module not in self._hooked:
                self._hooked[module] = None  # first: an interruption must leave no hook that nobody knows
                module.register_forward_pre_hook(_EnterHook(self.number, module), with_kwargs=True)
                # Prepended, so that of two captures the one entered last leaves first.
                module.register_forward_hook(_LeaveHook(self.number, module), prepend=True, always_call=True)

    def remove(self) -> None:
        """Removes every hook. May be called again, also after an interruption."""
        _remove_all(self._hooked, self.number)
        self._finalizer.detach()


def _remove_all(hooked: dict[nn.Module, None], number: int) -> None:
    _WATCHERS.pop(number, None)
    _remove_from(list(hooked), hooked, number)


def _remove_from(modules: Iterable[nn.Module], hooked: dict[nn.Module, None], number: int) -> None:
    for module in modules:
        remove_hooks(module, lambda hook: isinstance(hook, _Hook) and hook.number == number)
        hooked.pop(module, None)


class _Solo(threading.local):
    """The blocks of this thread in which one watcher alone hears what runs, innermost last."""

    def __init__(self) -> None:
        self.blocks: list[Alone] = []

    def admits(self, number: int) -> bool:
        """Whether this watcher hears: the innermost block is its own, or began before it."""
        while self.blocks and not is_running(self.blocks[-1].frame):
            self.blocks.pop()  # an interruption left it behind
        return not self.blocks or number == self.blocks[-1].number or number > self.blocks[-1].latest


_solo = _Solo()


class Alone:
    """A block in which, on this thread, only one watcher and those made within hear the forwards that run.

    It ends with its function at the latest, even if an interruption skips its end.
    """

    def __init__(self, hooks: HookSet) -> None:
        self.number = hooks.number

    def __enter__(self) -> None:
        self.latest = next(_NUMBERS)
        self.frame = sys._getframe(1)
        _solo.blocks.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _solo.blocks:
            _solo.blocks.remove(self)


def is_recomputing() -> bool:
    """Whether this thread is in a backward, where checkpointing repeats a pass."""
    return in_backward()
