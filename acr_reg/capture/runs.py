"""What is remembered while a captured model runs: the modules that are running, and the encoder runs they make."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn

from acr_reg.attention.call import SeenCall
from acr_reg.capture.hooks import is_running
from acr_reg.capture.mode import AttentionMode
from acr_reg.placement.images import ImageState
from acr_reg.placement.windows import WindowedOp


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
    calls: list[SeenCall] = field(default_factory=list)
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

    def summary(self) -> str:
        return f"{len(self.shapes)} attention calls, the first on {tuple(self.shapes[0])}" if self.shapes else "none"

    def release(self) -> None:
        self.kept = False
        self.calls.clear()


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
    calls: list[SeenCall] | None = None


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
