"""Keeps the encoder runs of a captured model, and the modules that are running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal

from torch import nn

from acr_reg.attention.call import AttentionCall
from acr_reg.capture.hooks import is_running
from acr_reg.capture.mode import AttentionMode
from acr_reg.placement.images import ImageState
from acr_reg.placement.windows import WindowedOp

Keep = Literal["only", "first", "last", "all"]

REMEMBERED = 8  # runs not yet taken: an error lists this many


@dataclass(eq=False)
class Run:
    """One pass through an encoder, and what it computed."""

    images: tuple[int, int, int] | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fired: Counter[nn.Module] = field(default_factory=Counter)
    shapes: list[Sequence[int]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)  # (module, kernel) with nothing to record
    silent: set[nn.Module] = field(default_factory=set)  # modules that ran without attention
    reentrant: set[nn.Module] = field(default_factory=set)  # checkpointed by use_reentrant=True
    windowed: dict[str, WindowedOp] = field(default_factory=dict)  # by name, in order, while all is watched
    preceded: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # ops before the first and last call
    visit: list[FrameType] = field(default_factory=list)  # the frame of the whole model's call, until it returns
    kept: bool = True
    failed: bool = False
    closed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.failed and all(is_running(frame) for frame in self.visit)

    def release(self) -> None:
        self.kept = False
        self.calls.clear()


class RunLog:
    """The runs since the last take; only those that ``keep`` asks for hold tensors."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.runs: list[Run] = []
        self.started = 0
        self.outside: list[str] = []  # softmaxes of passes without attention, in words
        self.without_grad = 0  # module calls under torch.no_grad that were not recorded

    def add(self, run: Run) -> None:
        self.started += 1
        finished = [r for r in self.runs if not r.failed]
        if self.keep in ("only", "last"):
            for earlier in finished:
                earlier.release()
            finished = finished[-(REMEMBERED - 1) :]  # warm-up steps that nobody takes must not pile up
        if self.keep == "first" and finished:
            run.release()
        else:
            self.runs = [*finished, run]

    def take(self) -> list[Run]:
        """Returns the complete runs and forgets them."""
        # Copies, because a thread still refers to its last run but must not keep the tensors.
        runs = [replace(run, calls=list(run.calls)) for run in self.runs if run.is_whole]
        self.clear()
        return runs

    def clear(self) -> None:
        for run in self.runs:
            run.closed = True
            run.release()
        self.runs = []
        self.started = 0


@dataclass(eq=False, slots=True)
class Entry:
    """A hooked module that is running, with what it was given."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: FrameType
    opened_mode: bool = False
    set_aside: AttentionMode | None = None  # the mode that is off the stack while this module runs
    recomputes: bool = False  # in a backward, a forward that checkpointing discarded
    visit: list[FrameType] | None = None  # for a call of the whole model; shared with its runs
    run: Run | None = None
    reported: bool = False
    calls: list[AttentionCall] | None = None


class ThreadState(threading.local):
    """The hooked modules running on this thread, innermost last, and their run."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.mode: AttentionMode | None = None
        self.run: Run | None = None
        self.coming = Run()  # holds what comes before the next run's first attention
        self.images = ImageState()

    @property
    def current(self) -> Run:
        """The run that a call now belongs to."""
        return self.coming if self.run is None or self.run.closed else self.run

    @property
    def innermost(self) -> Entry | None:
        """The innermost running module; None in a recomputation or under a mode that an interruption left behind."""
        entry = self.entries[-1] if self.entries else None
        return entry if entry is not None and is_running(entry.frame) and not entry.recomputes else None

    def begin_visit(self, entry: Entry) -> None:
        """Begins a run with a call of the whole model, whether or not the run before it finished."""
        self.end_run()
        entry.visit = [entry.frame]
        self.coming = Run(visit=entry.visit)

    def begin_run(self) -> Run:
        self.end_run()
        self.run, self.coming = self.coming, Run(visit=self.coming.visit)
        return self.run

    def fail(self) -> None:
        if self.run is not None and not self.run.closed:
            self.run.failed = True
        self.coming = Run()

    def end_run(self) -> None:
        if self.run is not None:
            self.run.closed = True
