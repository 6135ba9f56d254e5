"""What is remembered while a captured model runs: the modules that are running, and the encoder runs they make."""

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

REMEMBERED = 8  # runs that an error about too many of them lists


@dataclass(eq=False)
class Visit:
    """One call of the whole model. ``frame`` is that of the call, until it returns."""

    frame: FrameType | None

    @property
    def was_interrupted(self) -> bool:
        return self.frame is not None and not is_running(self.frame)


@dataclass(eq=False)
class Run:
    """One pass through an encoder: its calls, until it ends or its tensors are released."""

    images: tuple[int, int, int] | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fired: Counter[nn.Module] = field(default_factory=Counter)
    shapes: list[Sequence[int]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)  # modules with kernels that leave nothing to record
    silent: set[nn.Module] = field(default_factory=set)  # modules that ran without any attention seen in them
    reentrant: set[nn.Module] = field(default_factory=set)  # modules that reentrant checkpointing ran without a graph
    windowed: dict[str, WindowedOp] = field(default_factory=dict)  # by module name, in order; until hooks are narrowed
    preceded: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # by how many, first and last call
    visit: Visit | None = None
    kept: bool = True
    failed: bool = False
    closed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.failed and not (self.visit is not None and self.visit.was_interrupted)

    def release(self) -> None:
        self.kept = False
        self.calls.clear()


class RunLog:
    """The runs since the last take, with the tensors of those that ``keep`` asks for."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.runs: list[Run] = []
        self.started = 0
        self.outside: list[str] = []  # what was seen in passes without any attention
        self.without_grad = 0  # calls of modules under torch.no_grad, where they are not recorded

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
        """The whole runs, which are then forgotten here."""
        # Copies, because a thread still refers to the run it was last in, and must not keep its tensors.
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
    recomputes: bool = False  # in a backward, what checkpointing threw away
    visit: Visit | None = None
    run: Run | None = None
    reported: bool = False
    calls: list[AttentionCall] | None = None


class ThreadState(threading.local):
    """The hooked modules now running on this thread, innermost last, and the run they belong to."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.mode: AttentionMode | None = None
        self.run: Run | None = None
        self.coming = Run()  # what is seen before the first attention of the next run
        self.images = ImageState()

    @property
    def current(self) -> Run:
        """The run that what is seen now belongs to."""
        return self.coming if self.run is None or self.run.closed else self.run

    @property
    def innermost(self) -> Entry | None:
        """The innermost module that is running. None where what is seen now is nobody's: a mode that an interruption
        left on this thread, or a recomputation."""
        entry = self.entries[-1] if self.entries else None
        return entry if entry is not None and is_running(entry.frame) and not entry.recomputes else None

    def end_run(self) -> None:
        if self.run is not None:
            self.run.closed = True

    def begin_visit(self, entry: Entry) -> None:
        """A call of the whole model begins a run, whatever became of the one before."""
        self.end_run()
        entry.visit = Visit(entry.frame)
        self.coming = Run(visit=entry.visit)

    def begin_run(self) -> Run:
        self.end_run()
        self.run, self.coming = self.coming, Run(visit=self.coming.visit)
        return self.run

    def fail(self) -> None:
        if self.run is not None and not self.run.closed:
            self.run.failed = True
        self.coming = Run()
