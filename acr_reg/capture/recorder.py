"""Sorts everything that the hooks and the mode see of one model into encoder runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from acr_reg._torch_private import (
    in_backward,
    in_reentrant_checkpoint,
    is_faked,
    is_split,
    shards_parameters,
)
from acr_reg.attention.call import AttentionCall
from acr_reg.capture.hooks import HookSet
from acr_reg.capture.mode import AttentionMode, clear_modes
from acr_reg.capture.refusals import insist_on_output, refuse_elsewhere, refuse_inside, refuse_unknown_module
from acr_reg.capture.runs import Entry, Keep, Run, RunLog, ThreadState, ThreadStates
from acr_reg.capture.scores import Listener
from acr_reg.capture.stacks import RunningForwards, is_running, suspendable_callers
from acr_reg.capture.starts import GraphStarts
from acr_reg.placement.images import ImageWatch
from acr_reg.placement.kinds import first_tensor
from acr_reg.placement.placer import Placer
from acr_reg.placement.windows import WINDOWED


def _attends_to_nested(entry: Entry) -> bool:
    """Whether it is torch's multi-head attention of nested tensors, which torch refuses to run under a mode."""
    if not isinstance(entry.module, nn.MultiheadAttention):
        return False
    query = entry.args[0] if entry.args else entry.kwargs.get("query")
    return isinstance(query, torch.Tensor) and query.is_nested


class Recorder:
    """Watches the modules of one model and sorts their attention calls into runs."""

    def __init__(
        self, placer: Placer, keep: Keep, no_grad: bool, double_backward: bool, graph_from: int | None, products: bool
    ) -> None:
        self.placer, self.index = placer, placer.index
        self._running = RunningForwards(self.index.names)
        self.log = RunLog(keep, self._running)
        self.images = ImageWatch(placer.image_channels)
        self._no_grad = no_grad
        self._double_backward = double_backward
        self.starts = GraphStarts(graph_from)
        self.split: set[nn.Module] = set()  # modules whose parameters tensor parallelism splits over ranks
        self._unknown_modules: set[nn.Module] = set()  # their kernels cannot be recorded
        self._alike: set[nn.Module] = set()  # modules that attend, and modules that resemble them
        self._narrowed = False  # to these, the model, and modules that read its images
        modes: dict[int, AttentionMode] = {}  # by thread
        self.states = ThreadStates(modes, self.images)
        weakref.finalize(self, _remove_modes, modes)
        graph = None if graph_from is None else _weakly(self._starts_graph)
        running = _weakly(self._entries)
        listener = Listener(_weakly(self._report), running, _weakly(self._report_unknown), graph)
        self._new_mode = partial(AttentionMode, listener, modes, double_backward, products)
        if (inside := self._running.here(self.index.counts)) is not None:
            refuse_inside(inside, "A capture begun")
        self.hooks = HookSet(self)
        # Every module, until the first run is taken and shows which ones matter.
        self.hooks.watch_only(self.index.names)

    # ---- called by the hooks

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        state = self.states.here()
        if module not in self.index.names:
            refuse_unknown_module(module)
        if state.entries:
            self._drop_interrupted(state)
        if self._running.began_before():
            return
        if not torch.is_grad_enabled() and not self._no_grad:
            self._pass_over(state, module)
            return
        if in_backward():  # checkpointing repeats a pass that was already seen
            # by the kernel and the graph of the first pass
            if self._double_backward or self.starts.graph_from is not None:
                self._begin(state, Entry(module, args, kwargs, frame, recomputes=True), with_mode=True)
            return
        is_root, outermost = module is self.index.model, not state.entries
        if outermost:
            state.resume(suspendable_callers(frame))
        entry = Entry(module, args, kwargs, frame)
        if is_root and outermost:
            state.begin_visit(entry)
        if not self._narrowed:
            state.follow_sources(self.index)
        # Later on, the input of an attention module may look like an image of few rows.
        if not self._narrowed or is_root or module in self.images.modules:
            first = args[0] if args else next(iter(kwargs.values()), None)
            state.note_images(module, first, outermost, is_root)
        state.note_given(module, (*args, *kwargs.values()), outermost)
        # While the module runs, fully_shard has gathered its parameters; those that are still split stay so.
        if not self._narrowed and any(map(is_split, module.parameters(recurse=False))):
            self.split.add(module)
        self._begin(state, entry, with_mode=not self._narrowed or module in self._alike)

    def left(self, module: nn.Module, result: Any, failed: bool) -> None:
        state = self.states.here()
        if state.entries and state.entries[-1].module is not module:
            self._drop_interrupted(state)  # the model may have caught the interruption itself
        if not state.entries or state.entries[-1].module is not module:
            return
        entry = state.entries[-1]
        if entry.recomputes:
            pass
        elif failed:
            state.fail()
        elif entry.reported:
            entry.note_output(result)
            if len(state.entries) > 1:
                state.entries[-2].reported = True
        else:
            state.note_silent(entry, result)
            if not self._narrowed and isinstance(module, WINDOWED):
                given = first_tensor(entry.args, entry.kwargs)
                state.current.windows.note(self.index.names[module], module, given, result)
        if entry.visit is not None and not failed and shards_parameters(module):
            for run in self.log.runs:
                if run.visit is entry.visit:
                    insist_on_output(result, run)
        if len(state.entries) == 1:
            state.keep_sources(result, module is self.index.model)
        self._drop(state)  # last: an interruption before leaves the entry, which the next call then drops

    def _pass_over(self, state: ThreadState, module: nn.Module) -> None:
        """Ignores a call under torch.no_grad, unless such calls are recorded."""
        self.log.without_grad += 1
        if state.entries and in_reentrant_checkpoint() and self.index.counts(module):
            state.current.reentrant.add(module)

    def _begin(self, state: ThreadState, entry: Entry, with_mode: bool) -> None:
        nested = with_mode and _attends_to_nested(entry)
        entry.opened_mode = with_mode and not nested and state.mode is None
        state.entries.append(entry)
        if nested:
            entry.set_aside = state.leave_mode()
            self._report_unknown("multi_head_attention_forward of nested tensors")
        if entry.opened_mode:
            state.open_mode(self._new_mode, None if entry.recomputes else state.sources)

    def _drop(self, state: ThreadState) -> None:
        """Undoes what the last entry did to the thread. May be called again, after an interruption."""
        entry = state.entries[-1]
        if entry.opened_mode:
            unmet = state.close_mode()
            if unmet and not entry.recomputes:
                name = self.index.names[entry.module]
                state.current.skipped += [(name, what) for what in unmet]
                if state.current is state.coming:
                    self.log.outside += [f"{name}: {what}" for what in unmet]
        if entry.visit is not None:
            entry.visit.frame = None
        if entry.set_aside is not None:
            state.enter(entry.set_aside)
            entry.set_aside = None
        state.entries.pop()  # last: an interruption before leaves the entry, which the next call then drops

    def _drop_interrupted(self, state: ThreadState) -> None:
        """Closes entries that a KeyboardInterrupt or SystemExit left behind, or a take() of another thread that removed
        their hooks: their forward is off the stack."""
        while state.entries and not is_running(state.entries[-1].frame):
            if self.hooks.is_watched(state.entries[-1].module):
                state.fail()
            self._drop(state)
            clear_modes()

    # ---- called by the mode

    def _entries(self) -> Sequence[Entry]:
        """The modules that run on this thread, outermost first."""
        state = self.states.here()
        self._drop_interrupted(state)
        return state.entries

    def _report(self, call: AttentionCall, within: Sequence[Entry]) -> None:
        """Notes a call under the innermost module that holds all of it."""
        state = self.states.here()
        if not within or state.entries[-1].recomputes:
            return
        entry, module = within[-1], within[-1].module
        if not self.index.counts(module) or not self.hooks.is_heard or is_faked():
            return
        if not torch.is_grad_enabled() and not self._no_grad:  # turned off within the module's own forward
            self._pass_over(state, module)
            return
        self.index.attending.add(module)
        run = entry.run
        if run is None or run is not state.run:  # else the module makes several maps in one call
            run = entry.run = state.run_of(module, self.index.registered[module])
            run.fired[module] += 1
        self.placer.remember(call, module, run.reports[module])
        self.log.add(run, call.observed is None or call.observed.is_of_image, state.runner)
        run.reports[module] += 1
        run.shapes.append(call.recorded.seen.shape)
        entry.reported = True
        if not self._narrowed:
            run.windows.note_attention(module)
        if run.kept:
            entry.keep(call, self.index.names[module])
            run.calls.append(call)

    def _report_unknown(self, kernel: str) -> None:
        state = self.states.here()
        entry = state.innermost
        if entry is not None and self.index.counts(entry.module) and self.hooks.is_heard:
            entry.reported = True
            self._unknown_modules.add(entry.module)
            name, current = self.index.names[entry.module], state.current
            current.unknown.append((name, kernel))
            if current is state.coming:
                self.log.outside.append(f"{name}: {kernel} leaves nothing to record")

    def _starts_graph(self, tensor: torch.Tensor) -> bool:
        """Whether the graph starts at this tensor of the coming layer, or did in a pass that checkpointing repeats."""
        state = self.states.here()
        if not torch.is_grad_enabled() or not state.entries or not self.hooks.is_heard:
            return False
        if in_backward():
            return self.starts.has(tensor, state.entries[-1].module)
        around = (entry.module for entry in state.entries)
        return state.innermost is not None and self.starts.begin(tensor, len(state.current.calls), around)

    # ---- called by the handle

    def finish(self) -> list[Run]:
        """The runs since the last call; from then on only attention modules are watched."""
        state = self.states.here()
        self._drop_interrupted(state)
        if self.log.keep != "all" and self.log.has_unfinished(state.runner):
            refuse_elsewhere(self.index.model)
        runs = self.log.take(state.runner)
        state.runner.takes = True
        state.forget()
        if not self._narrowed:
            for run in runs:
                self.placer.trace(run.windows, run.images)
            self._narrow(runs)
        return runs

    def _narrow(self, runs: list[Run]) -> None:
        # Reentrant checkpointing must be refused in later steps too, so all modules stay watched. So they do while
        # another thread is inside one: its hook would not tell when it is left.
        inside = self.states.here().entries or self._running.is_elsewhere() or self.placer.needs_more_images
        if self.index.attending and not inside and not any(run.reentrant for run in runs):
            # Where no mode is on, the encoder makes nested tensors of padded ones, which could not be recorded, and its
            # layers call one kernel in place of their attention, if torch does not look for hooks before (torch 2.1).
            fast = nn.TransformerEncoder, nn.TransformerEncoderLayer
            encoders = {m for m in self.index.names if isinstance(m, fast) and self.index.counts(m)}
            self._alike = self.index.alike() | self._unknown_modules | encoders
            self._narrowed = True  # first: modules that an interruption leaves watched cost time only
            self.states.here().sources = None
            self.hooks.watch_only([self.index.model, *self.images.modules, *self._alike, *self.index.likely])

    def refuse_inside(self, action: str) -> None:
        """Raises if this thread is inside the forward of a captured module, of which more layers may come."""
        module = self._running.here(self.index.counts)
        # A hook of the model may ask once the model has left its forward.
        if module is not None and (module is not self.index.model or self.states.here().is_inside(module)):
            refuse_inside(module, action)

    def clear(self) -> None:
        """Forgets the runs that this thread may take."""
        self.log.take(self.states.here().runner)

    def stop(self) -> None:
        state = self.states.here()
        while state.entries:  # interrupted, or in the middle of a forward
            self._drop(state)
        _remove_modes(state.modes)
        self.hooks.remove()
        self.log.clear()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, or nothing once its object is gone: a mode that was left behind must not keep the recorder alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


def _remove_modes(modes: dict[int, AttentionMode]) -> None:
    """Removes the mode that is left on this thread. Those of forwards on other threads only fall silent."""
    left = list(modes.values())
    modes.clear()
    clear_modes()
    for mode in left:
        mode.forget()
