"""Sorts everything that the hooks and the mode see of one model into encoder runs."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import nn

from acr_reg._torch_private import in_backward, in_reentrant_checkpoint, is_faked, remove_mode
from acr_reg.attention.call import AttentionCall
from acr_reg.capture.hooks import HookSet, is_running
from acr_reg.capture.mode import AttentionMode
from acr_reg.capture.refusals import refuse_unknown_module
from acr_reg.capture.runs import Entry, Keep, Run, RunLog, ThreadState
from acr_reg.capture.starts import GraphStarts
from acr_reg.placement.images import ImageWatch
from acr_reg.placement.kinds import first_tensor, is_cross_attention
from acr_reg.placement.placer import Placer
from acr_reg.placement.windows import WINDOWED, windowed_op


class Recorder:
    """Watches the modules of one model and sorts their attention calls into runs."""

    def __init__(
        self, placer: Placer, keep: Keep, no_grad: bool, double_backward: bool, graph_from: int | None, products: bool
    ) -> None:
        self.placer = placer
        self.index = placer.index
        self.log = RunLog(keep)
        self.images = ImageWatch(placer.image_channels)
        self.last_count = 0  # layers of the last run taken, for a negative graph_from
        self._no_grad = no_grad
        self._double_backward = double_backward
        self._graph_from = graph_from
        self._starts = GraphStarts()
        self._record_products = products
        self._unknown_modules: set[nn.Module] = set()  # their kernels cannot be recorded
        self._alike: set[nn.Module] = set()  # modules that attend, and modules that resemble them
        self._narrowed = False  # to these, the model, and modules that read its images
        self._state = ThreadState()
        self._hooks = HookSet(self)
        # Every module, until the first run is taken and shows which ones matter.
        self._hooks.watch_only(self.index.names)

    # ---- called by the hooks

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        state = self._state
        if module not in self.index.names:
            refuse_unknown_module(module)
        if state.entries:
            self._drop_interrupted(state)
        if not torch.is_grad_enabled() and not self._no_grad:
            self._pass_over(state, module)
            return
        if in_backward():  # checkpointing repeats a pass that was already seen
            if self._double_backward or self._graph_from is not None:  # by the kernel and the graph of the first pass
                self._begin(state, Entry(module, args, kwargs, frame, recomputes=True), with_mode=True)
            return
        outermost = not state.entries
        entry = Entry(module, args, kwargs, frame)
        if module is self.index.model and outermost:
            state.begin_visit(entry)
        self._note_images(entry, state, outermost)
        self._begin(state, entry, with_mode=not self._narrowed or module in self._alike)

    def left(self, module: nn.Module, result: Any, failed: bool) -> None:
        state = self._state
        if not state.entries or state.entries[-1].module is not module:
            return
        entry = state.entries.pop()
        if entry.recomputes:
            pass
        elif failed:
            state.fail()
        elif entry.reported:
            if entry.calls is not None:
                shape = None if (tensor := first_tensor(result)) is None else tensor.shape
                for call in entry.calls:
                    call.output_shape = shape
            if state.entries:
                state.entries[-1].reported = True
        else:
            state.current.silent.add(module)
            if not self._narrowed and isinstance(module, WINDOWED):
                self._note_windows(state.current, entry, result)
        self._close(state, entry)

    def _pass_over(self, state: ThreadState, module: nn.Module) -> None:
        """Ignores a call under torch.no_grad, unless such calls are recorded."""
        self.log.without_grad += 1
        if state.entries and in_reentrant_checkpoint() and self.index.counts(module):
            state.current.reentrant.add(module)

    def _note_windows(self, run: Run, entry: Entry, result: Any) -> None:
        name, given = self.index.names[entry.module], first_tensor(entry.args, entry.kwargs)
        if name not in run.windowed and given is not None and isinstance(result, torch.Tensor):
            op = windowed_op(name, entry.module, given.shape, result.shape)
            if op is not None:
                run.windowed[name] = op

    def _note_images(self, entry: Entry, state: ThreadState, outermost: bool) -> None:
        module, is_root = entry.module, entry.module is self.index.model
        if self._narrowed and not is_root and module not in self.images.modules:
            return  # the input of an attention module may look like an image of few rows
        first = entry.args[0] if entry.args else next(iter(entry.kwargs.values()), None)
        if self.images.note(module, first, state.images, outermost, is_root):
            state.end_run()

    def _begin(self, state: ThreadState, entry: Entry, with_mode: bool) -> None:
        if with_mode and state.mode is None:
            graph = None if self._graph_from is None else self._starts_graph
            mode = AttentionMode(
                self._report, self._report_unknown, self._double_backward, graph, self._record_products
            )
            mode.__enter__()  # type: ignore[no-untyped-call]
            state.mode = mode
            entry.opened_mode = True
        state.entries.append(entry)

    def _close(self, state: ThreadState, entry: Entry) -> None:
        if entry.visit is not None:
            entry.visit.clear()
        if not entry.opened_mode or state.mode is None:
            return
        mode, state.mode = state.mode, None
        remove_mode(mode)
        state.images.seen = None
        unmet = mode.forget()
        if entry.recomputes:
            return
        name = self.index.names[entry.module]
        state.current.skipped += [(name, what) for what in unmet]
        if state.current is state.coming:
            self.log.outside += [f"{name}: {what}" for what in unmet]

    def _drop_interrupted(self, state: ThreadState) -> None:
        """Closes entries that a KeyboardInterrupt or SystemExit left behind: their forward is off the stack."""
        while state.entries and not is_running(state.entries[-1].frame):
            state.fail()
            self._close(state, state.entries.pop())

    # ---- called by the mode

    def _report(self, call: AttentionCall) -> None:
        state = self._state
        entry = state.innermost
        if entry is None or not self.index.counts(entry.module) or is_faked():
            return
        module = entry.module
        if not torch.is_grad_enabled() and not self._no_grad:  # turned off within the module's own forward
            self._pass_over(state, module)
            return
        self.index.attending.add(module)
        run = entry.run
        if run is None or run is not state.run:  # else the module makes several maps in one call
            run = entry.run = self._run_of(state, module)
            run.fired[module] += 1
        run.shapes.append(call.recorded.seen.shape)
        entry.reported = True
        if not self._narrowed:
            before = len(run.windowed)
            run.preceded[module] = run.preceded.get(module, (before, 0))[0], before
        if run.kept:
            given = first_tensor(entry.args, entry.kwargs)
            call.name, call.module = self.index.names[module], module
            call.cross = is_cross_attention(entry.args, entry.kwargs)
            call.input_shape = None if given is None else given.shape
            entry.calls = [call] if entry.calls is None else [*entry.calls, call]
            run.calls.append(call)

    def _report_unknown(self, kernel: str) -> None:
        entry = self._state.innermost
        if entry is not None and self.index.counts(entry.module):
            entry.reported = True
            self._unknown_modules.add(entry.module)
            self._state.current.unknown.append((self.index.names[entry.module], kernel))

    def _starts_graph(self, tensor: torch.Tensor) -> bool:
        """Whether the graph starts at this tensor of the coming layer: at ``graph_from`` or above, or where a pass that
        checkpointing repeats started it."""
        assert self._graph_from is not None
        if not torch.is_grad_enabled() or not self._state.entries:
            return False
        if in_backward():
            return self._starts.has(tensor, self._state.entries[-1].module)
        first = self._graph_from if self._graph_from >= 0 else self.last_count + self._graph_from
        starts = self._state.innermost is not None and len(self._state.current.calls) >= first
        if starts:
            self._starts.add(tensor, (entry.module for entry in self._state.entries))
        return starts

    def _run_of(self, state: ThreadState, module: nn.Module) -> Run:
        """The run of this call: a new one once the module has fired as often as it is registered."""
        run = state.run
        if run is not None and not run.closed and not run.failed and run.fired[module] < self.index.registered[module]:
            return run
        run = state.begin_run()
        run.images = state.images.size
        if state.images.module is not None:
            self.images.modules.add(state.images.module)
        state.images.reset()
        self.log.add(run)
        return run

    # ---- called by the handle

    def finish(self) -> list[Run]:
        """The runs since the last call; from then on only attention modules are watched."""
        self._drop_interrupted(self._state)
        runs = self.log.take()
        if not self._narrowed:
            for run in runs:
                self.placer.trace(run.windowed, run.images, run.preceded)
            self._narrow(runs)
        return runs

    def _narrow(self, runs: list[Run]) -> None:
        # Reentrant checkpointing must be refused in later steps too, so all modules stay watched.
        if self.index.attending and not self._state.entries and not any(run.reentrant for run in runs):
            self._alike = self.index.alike() | self._unknown_modules
            self._hooks.watch_only([self.index.model, *self.images.modules, *self._alike, *self.index.likely])
            self._narrowed = True

    def stop(self) -> None:
        state = self._state
        self._drop_interrupted(state)
        while state.entries:  # in the middle of a forward
            self._close(state, state.entries.pop())
        self._hooks.remove()
        self.log.clear()
