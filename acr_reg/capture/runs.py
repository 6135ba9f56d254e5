"""Keeps the encoder runs of a captured model, and the modules that are running."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import count
from types import FrameType
from typing import Any, Literal

from torch import Tensor, nn

from acr_reg._torch_private import is_faked, shards_parameters, tensors_of
from acr_reg.attention.call import AttentionCall
from acr_reg.capture.mode import AttentionMode, clear_modes
from acr_reg.capture.stacks import RunningForwards, is_running, is_running_on
from acr_reg.placement.grids import class_token_parameters
from acr_reg.placement.images import ImageState, ImageWatch
from acr_reg.placement.kinds import first_tensor, is_cross_attention
from acr_reg.placement.modules import ModuleIndex
from acr_reg.placement.sources import Sources
from acr_reg.placement.windows import WindowsSeen

Keep = Literal["only", "first", "last", "all"]

REMEMBERED = 8  # runs not yet taken: an error lists this many
_STRANDS = 64  # pieces of code that run a model in turns; more may be abandoned ones


class Runner:
    """A thread that runs the model."""

    def __init__(self) -> None:
        self._thread = weakref.ref(threading.current_thread())  # a thread may hold the capture
        self.ident = threading.get_ident()
        self.takes = False  # whether it ever took what it ran: then nobody else does
        self.started = 0  # runs since they were last taken

    @property
    def has_ended(self) -> bool:
        thread = self._thread()
        return thread is None or not thread.is_alive()


@dataclass(eq=False)
class Visit:
    """One call of the whole model."""

    frame: FrameType | None  # None once it has returned
    thread: int = field(default_factory=threading.get_ident)

    @property
    def is_running(self) -> bool:
        return self.frame is not None and is_running_on(self.thread, self.frame)


@dataclass(eq=False)
class Run:
    """One pass through an encoder, and what it computed."""

    images: tuple[int, int, int] | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fired: Counter[nn.Module] = field(default_factory=Counter)
    shapes: list[Sequence[int]] = field(default_factory=list)
    reports: Counter[nn.Module] = field(default_factory=Counter)  # attention calls of each module
    unknown: list[tuple[str, str]] = field(default_factory=list)  # (module, kernel) with nothing to record
    silent: set[nn.Module] = field(default_factory=set)  # modules that ran without attention
    reentrant: set[nn.Module] = field(default_factory=set)  # checkpointed by use_reentrant=True
    windows: WindowsSeen = field(default_factory=WindowsSeen)  # while all modules are watched
    visit: Visit | None = None
    of_image: bool = False  # whether any of its tokens may come from an image: else it is a text tower's
    kept: bool = True
    failed: bool = False
    closed: bool = False
    position: int = 0  # among those that its thread started since the last take
    number: int | None = None  # in the log
    runner: Runner = field(init=False)

    @property
    def is_whole(self) -> bool:
        return not self.failed and (self.visit is None or self.visit.frame is None or self.visit.is_running)

    def release(self) -> None:
        self.kept = False
        self.calls.clear()


class RunLog:
    """The runs since the last take; only those that ``keep`` asks for hold tensors.

    A thread takes what it ran, and what threads ran that never take: once they have ended, or if it ran nothing itself.
    Threads share the log without a lock, which an interruption could leave locked: a run joins and leaves in one step.
    """

    def __init__(self, keep: Keep, forwards: RunningForwards) -> None:
        self.keep = keep
        self._forwards = forwards
        self._runs: dict[int, Run] = {}
        self._numbers = count()
        self.taken = False  # whether any run was ever taken or cleared
        self.outside: list[str] = []  # softmaxes of passes without attention, in words
        self.without_grad = 0  # module calls under torch.no_grad that were not recorded

    @property
    def runs(self) -> list[Run]:
        """The runs of all threads, in the order in which they began."""
        return list(self._runs.values())

    def add(self, run: Run, of_image: bool, runner: Runner) -> None:
        """Adds a run at its first call, or at its first call of an image: those of text alone give way to it."""
        if run.reports and of_image <= run.of_image:
            return
        run.of_image, run.runner = of_image, runner
        others = [r for r in self.runs if r is not run and (r.runner is runner or r.runner.has_ended)]
        if not of_image and any(r.of_image for r in others):
            return
        for text in [r for r in others if r.of_image < of_image]:
            text.runner.started -= self._forget(text)
        if run.number is not None:
            return
        runner.started += 1
        finished = [r for r in others if not r.failed and r.of_image == of_image]
        if self.keep in ("only", "last"):
            for earlier in finished:
                earlier.release()
            finished = finished[1 - REMEMBERED :]  # warm-up steps that nobody takes must not pile up
        for other in others:
            if other not in finished:
                self._forget(other)
        if self.keep == "first" and finished:
            run.release()
        else:
            run.number = next(self._numbers)
            self._runs[run.number] = run

    def waiting_for(self, runner: Runner) -> list[Run]:
        """The runs that this thread may take, complete or not."""
        runs = self.runs
        has_own = any(run.runner is runner for run in runs)
        return [
            run
            for run in runs
            if run.runner is runner or not (run.runner.takes or (has_own and not run.runner.has_ended))
        ]

    def is_elsewhere(self, run: Run, runner: Runner) -> bool:
        """Whether another thread than this one may go on with the run."""
        if run.failed or run.runner is runner or run.runner.has_ended:
            return False
        return run.visit.is_running if run.visit is not None else self._forwards.is_inside(run.runner.ident)

    def has_unfinished(self, runner: Runner) -> bool:
        """Whether another thread is in the middle of a run that this one may take."""
        return any(self.is_elsewhere(run, runner) for run in self.waiting_for(runner))

    def take(self, runner: Runner) -> list[Run]:
        """Forgets the runs that this thread may take, but for those that another thread is still in the middle of.
        Returns the complete ones."""
        waiting, taken = self.waiting_for(runner), []
        for run in waiting:
            if self.is_elsewhere(run, runner):
                continue
            # A copy, because a thread still refers to its last run but must not keep the tensors.
            whole = copy(run)
            whole.calls, whole.position = list(run.calls), run.runner.started - 1
            if self._forget(run) and whole.is_whole:  # of two threads only one forgets it
                taken.append(whole)
        for run in self.runs:
            if run.runner.takes and run.runner.has_ended:  # it would have taken them
                self._forget(run)
        for each in {runner, *(run.runner for run in waiting)}:
            each.started = sum(run.runner is each for run in self.runs)
        self.taken = self.taken or bool(taken)
        return taken

    def clear(self) -> None:
        """Forgets the runs of all threads."""
        for run in self.runs:
            self._forget(run)

    def _forget(self, run: Run) -> bool:
        """Forgets a run, and returns whether it was there. Nothing joins it any more."""
        was_there = run.number is not None and self._runs.pop(run.number, None) is not None
        run.closed = True
        run.release()
        return was_there


@dataclass(eq=False)
class Entry:
    """A hooked module that is running, with what it was given."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: FrameType
    opened_mode: bool = False
    set_aside: AttentionMode | None = None  # the mode that is off the stack while this module runs
    recomputes: bool = False  # in a backward, a forward that checkpointing discarded
    visit: Visit | None = None  # for a call of the whole model; shared with its runs
    run: Run | None = None
    reported: bool = False
    calls: list[AttentionCall] | None = None
    number: int = field(default_factory=count().__next__)

    def keep(self, call: AttentionCall, name: str) -> None:
        """Notes in a call within this module, called ``name``, what the module was given."""
        given = first_tensor(*self.args, *self.kwargs.values())
        call.name, call.module = name, self.module
        call.cross = call.cross or is_cross_attention(self.args, self.kwargs)
        call.input_shape = None if given is None else given.shape
        if shards_parameters(self.module):
            call.recorded = replace(call.recorded, sharded=True)
        self.calls = [call] if self.calls is None else [*self.calls, call]

    def note_output(self, result: Any) -> None:
        """Notes in its calls what the module returned."""
        if self.calls is not None:
            shape = None if (tensor := first_tensor(result)) is None else tensor.shape
            for call in self.calls:
                call.output_shape = shape


@dataclass(eq=False)
class Strand:
    """The runs of one piece of code, among several on a thread that call the model in turns."""

    callers: tuple[FrameType, ...] = ()  # the generators and coroutines that began its run, outermost first
    run: Run | None = None
    coming: Run = field(default_factory=Run)  # holds what comes before the next run's first attention
    images: ImageState = field(default_factory=ImageState)

    @property
    def is_open(self) -> bool:
        """Whether a run has begun and may go on."""
        return self.has_open_run or bool(self.coming.silent) or self.images.size is not None

    @property
    def has_open_run(self) -> bool:
        return self.run is not None and not self.run.closed


class ThreadState:
    """The hooked modules running on one thread, innermost last, and their run."""

    def __init__(self, modes: dict[int, AttentionMode], watch: ImageWatch) -> None:
        self.entries: list[Entry] = []
        self.sources: Sources | None = None  # while all modules are watched
        self.modes = modes  # by thread
        self._spare_mode: AttentionMode | None = None
        modes.pop(threading.get_ident(), None)  # of a thread that had this number before
        self._watch = watch
        self.runner = Runner()
        self._callers: tuple[FrameType, ...] = ()
        self._strands = [Strand()]
        self.strand = self._strands[0]

    @property
    def mode(self) -> AttentionMode | None:
        """The mode entered on this thread."""
        return self.modes.get(threading.get_ident())

    def enter(self, mode: AttentionMode) -> None:
        clear_modes()
        self.modes[threading.get_ident()] = mode  # first: an interruption must leave no mode that nobody knows
        mode.__enter__()  # type: ignore[no-untyped-call]

    def open_mode(self, make: Callable[[Sources | None], AttentionMode], sources: Sources | None) -> None:
        """Enters a mode, which is made once if it follows no sources: attention begins in every layer."""
        if sources is None and self._spare_mode is None:
            self._spare_mode = make(None)
        mode = make(sources) if sources is not None or self._spare_mode is None else self._spare_mode
        self.enter(mode)
        mode.watch_functions()

    def close_mode(self) -> list[str]:
        """Leaves the mode of this thread for good. Returns descriptions of the softmaxes that met no V."""
        self.images.seen = None
        mode = self.mode
        unmet = [] if mode is None else mode.forget()
        self.leave_mode()
        return unmet

    def leave_mode(self) -> AttentionMode | None:
        """Leaves the mode of this thread, and returns it."""
        mode = self.modes.pop(threading.get_ident(), None)
        clear_modes()
        return mode

    @property
    def run(self) -> Run | None:
        return self.strand.run

    @property
    def coming(self) -> Run:
        return self.strand.coming

    @property
    def images(self) -> ImageState:
        return self.strand.images

    @property
    def current(self) -> Run:
        """The run that a call now belongs to."""
        run, coming = self.strand.run, self.strand.coming
        return coming if run is None or run.closed else run

    @property
    def innermost(self) -> Entry | None:
        """The innermost running module; None in a recomputation or under a mode that an interruption left behind."""
        entry = self.entries[-1] if self.entries else None
        return entry if entry is not None and is_running(entry.frame) and not entry.recomputes else None

    def is_inside(self, module: nn.Module) -> bool:
        return any(entry.module is module for entry in self.entries)

    def resume(self, callers: tuple[FrameType, ...]) -> None:
        """Goes on with the strand of these generators and coroutines: the one that shares most of them, or the last."""
        self._callers = callers
        if len(self._strands) > 1:
            self.strand = max(reversed(self._strands), key=lambda strand: _shared(strand.callers, callers))
            self._strands.remove(self.strand)
            self._strands.append(self.strand)
        if not self.strand.is_open:
            self.strand.callers = callers

    @property
    def is_suspended(self) -> bool:
        """Whether generators or coroutines began the strand that do not run now, and so may go on later."""
        return self.strand.is_open and self.strand.callers != self._callers[: len(self.strand.callers)]

    def leave_suspended(self) -> None:
        """Leaves the strand to its code, if that is suspended, and turns to a new one."""
        if self.is_suspended:
            strands = [strand for strand in self._strands if strand.is_open]
            self.strand = Strand(self._callers)
            self._strands = [*strands[-_STRANDS:], self.strand]

    def begin_visit(self, entry: Entry) -> None:
        """Begins a run with a call of the whole model, whether or not the run before it finished."""
        self.leave_suspended()
        self.end_run()
        entry.visit = Visit(entry.frame)
        self.strand.coming = Run(visit=entry.visit)

    def follow_sources(self, index: ModuleIndex) -> None:
        """Begins to follow the images through the model, unless that has begun."""
        if self.sources is None and not is_faked():
            self.sources = Sources(class_token_parameters(index.model))
            self.sources.hold(tensor for module in index.names for tensor in tensors_of(module))

    def note_given(self, module: nn.Module, given: Sequence[Any], outermost: bool) -> None:
        """Notes what a module holds, and what code outside the model gives to the outermost module."""
        if self.sources is not None:
            self.sources.hold(tensors_of(module))
            if outermost:
                self.sources.lose(given, "code outside the captured model")

    def note_silent(self, entry: Entry, result: Any) -> None:
        """Notes a module that ran without attention, and what it returned."""
        self.current.silent.add(entry.module)
        if self.sources is not None:
            self.sources.lose(result, type(entry.module).__name__, (*entry.args, *entry.kwargs.values()))

    def keep_sources(self, made: Any, is_root: bool) -> None:
        """Goes on following what the outermost module made, unless that was the whole model."""
        if is_root:
            self.sources = None
        elif self.sources is not None:
            self.sources.keep_only(made)

    def note_images(self, module: nn.Module, first: Any, outermost: bool, is_root: bool) -> None:
        """Begins a run with the images that a module is given, if its ``first`` argument is any."""
        # Images of other code's run begin a run of their own, and must not replace those of the other.
        images = ImageState() if outermost and self.is_suspended else self.images
        if self._watch.note(module, first, images, outermost, is_root, self.sources):
            if images is not self.images:
                self.leave_suspended()
            self.end_run()
            self.strand.images = images
            if self.sources is not None and isinstance(first, Tensor):
                # What a second run of one visit reads, such as a flip made within the model, are its own images.
                ran = self.run is not None and self.run.of_image and self.run.visit is self.coming.visit is not None
                self.sources.note_images(first, anew=ran)

    def run_of(self, module: nn.Module, registered: int) -> Run:
        """The run of this call: a new one once the module has fired as often as it is ``registered``."""
        run = self.run
        if run is not None and not run.closed and not run.failed and run.fired[module] < registered:
            return run
        return self._begin_run()

    def _begin_run(self) -> Run:
        before = self.run
        self.end_run()
        run = self.coming
        self.strand.run, self.strand.coming = run, Run(visit=run.visit)
        run.images = self.images.size
        if run.images is None and before is not None and before.visit is run.visit and run.visit:
            run.images = before.images  # a part that runs twice in one call of the model
        if self.images.module is not None:
            self._watch.modules.add(self.images.module)
        self.images.reset()
        return run

    def fail(self) -> None:
        if self.run is not None and not self.run.closed:
            self.run.failed = True
        self.strand.coming = Run()

    def end_run(self) -> None:
        # What came before a run's first attention may be of another coroutine of the same task, which has ended.
        if self.strand.has_open_run or not _shared(self.strand.callers, self._callers):
            self.leave_suspended()
        if self.run is not None:
            self.run.closed = True
        self.strand.callers = self._callers

    def forget(self) -> None:
        """Frees the frames of code whose runs were taken."""
        self._callers = ()
        self._strands = [strand for strand in self._strands if strand.is_open or strand is self.strand]
        if not self.strand.is_open:
            self.strand.callers = ()


class ThreadStates:
    """The state of each thread. No thread holds it: the frames in it may hold the capture, which could then never be
    freed after an interruption."""

    def __init__(self, modes: dict[int, AttentionMode], watch: ImageWatch) -> None:
        self._modes, self._watch = modes, watch
        self._states: dict[int, ThreadState] = {}
        self._numbers = count()
        self._here = threading.local()
        self._begin()

    def here(self) -> ThreadState:
        """The state of this thread."""
        state = self._states.get(getattr(self._here, "number", -1))
        return self._begin() if state is None else state

    def _begin(self) -> ThreadState:
        for number, state in list(self._states.items()):
            if state.runner.has_ended:
                self._states.pop(number, None)
        self._here.number = next(self._numbers)
        state = self._states[self._here.number] = ThreadState(self._modes, self._watch)
        return state


def _shared(some: tuple[FrameType, ...], others: tuple[FrameType, ...]) -> int:
    """How many frames two stacks have in common, from the outermost on."""
    same = [a is b for a, b in zip(some, others, strict=False)]
    return same.index(False) if False in same else len(same)
