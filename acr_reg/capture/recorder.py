"""Sorts what the hooks and the mode see of one model into encoder runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from acr_reg._torch_private import in_backward, in_reentrant_checkpoint, is_faked, is_replica, remove_mode
from acr_reg.attention.call import AttentionCall, SeenCall
from acr_reg.capture.hooks import HookSet, is_running
from acr_reg.capture.mode import AttentionMode
from acr_reg.capture.runs import Entry, Run, ThreadState, Visit
from acr_reg.errors import CaptureError
from acr_reg.placement.images import ImageWatch
from acr_reg.placement.kinds import first_tensor, is_cross_attention
from acr_reg.placement.modules import Hints, ModuleIndex
from acr_reg.placement.windows import WINDOWED, windowed_op

Keep = Literal["only", "first", "last", "all"]

_NAMED_AT_MOST = 8  # runs that an error about too many of them lists


class Recorder:
    """Watches the modules of one model and sorts their attention calls into runs."""

    def __init__(
        self,
        model: nn.Module,
        within: Iterable[str | nn.Module] | None = None,
        keep: Keep = "only",
        hints: Hints = (None, None, None),
        no_grad: bool = False,
        double_backward: bool = False,
        graph_from: int | None = None,
        record_products: bool = False,
    ) -> None:
        self.index = ModuleIndex(model, within, hints)
        self.keep = keep
        self.images = ImageWatch()
        self.runs_started = 0  # runs since the last take
        self.last_count = 0  # layers of the last run taken, for a negative graph_from
        self._root = model
        self._no_grad = no_grad
        self._double_backward = double_backward
        self._graph_from = graph_from
        self._record_products = record_products
        self._attention_modules: set[nn.Module] = set()
        self._unknown_modules: set[nn.Module] = set()  # with kernels that leave nothing to record
        self._alike: set[nn.Module] = set()  # these and those that look like them
        self._narrowed = False  # whether only those are watched, the model itself and what reads its images
        self._outside: list[str] = []  # what was seen in passes without any attention
        self._runs: list[Run] = []
        self._without_grad = 0
        self._state = ThreadState()
        self._hooks = HookSet(self)
        # Until the first run is taken every module is watched; then only those that turned out to matter.
        self._hooks.watch_only(self.index.names)

    # ---- called by the hooks

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        state = self._state
        if module not in self.index.names:
            what = "nn.DataParallel runs replicas of it" if is_replica(module) else "it joined the model since"
            raise CaptureError(
                f"found a forward of a {type(module).__name__} that the capture does not know ({what}); expected the "
                "modules that were there when it began; use DistributedDataParallel, or capture again after the change"
            )
        if state.entries:
            self._drop_interrupted(state)
        if not torch.is_grad_enabled() and not self._no_grad:
            self._pass_over(state, module)
            return
        if in_backward():  # checkpointing recomputes what the first pass has already shown
            if self._double_backward:  # by the kernel of the first pass
                self._begin(state, Entry(module, args, kwargs, frame, recomputes=True), with_mode=True)
            return
        outermost = not state.entries
        entry = Entry(module, args, kwargs, frame)
        if module is self._root and outermost:
            self._begin_visit(state, entry)
        self._note_images(module, args, kwargs, state, outermost)
        self._begin(state, entry, with_mode=not self._narrowed or module in self._alike)

    def _pass_over(self, state: ThreadState, module: nn.Module) -> None:
        """What runs without a graph, where such runs are not recorded."""
        self._without_grad += 1
        if state.entries and in_reentrant_checkpoint():
            state.current.reentrant.add(module)

    def left(self, module: nn.Module, result: Any, failed: bool) -> None:
        state = self._state
        if not state.entries or state.entries[-1].module is not module:
            return
        entry = state.entries.pop()
        if entry.recomputes:
            pass
        elif failed:
            self._fail(state)
        elif entry.reported:
            if entry.calls is not None:
                shape = None if (tensor := first_tensor(result)) is None else tensor.shape
                for seen in entry.calls:
                    seen.output_shape = shape
            if state.entries:
                state.entries[-1].reported = True
        else:
            state.current.silent.add(module)
            if not self._narrowed and isinstance(module, WINDOWED):
                self._note_windows(state.current, entry, result)
        self._close(state, entry)

    def _note_windows(self, run: Run, entry: Entry, result: Any) -> None:
        name, given = self.index.names[entry.module], first_tensor(entry.args, entry.kwargs)
        if name not in run.windowed and given is not None and isinstance(result, torch.Tensor):
            op = windowed_op(name, entry.module, given.shape, result.shape)
            if op is not None:
                run.windowed[name] = op

    def _begin_visit(self, state: ThreadState, entry: Entry) -> None:
        """A call of the whole model begins a run, whatever became of the one before."""
        if state.run is not None:
            state.run.closed = True
        entry.visit = Visit(entry.frame)
        state.coming = Run(visit=entry.visit)

    def _note_images(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], state: ThreadState, outermost: bool
    ) -> None:
        if self._narrowed and module is not self._root and module not in self.images.modules:
            return  # the input of an attention module may look like an image of few rows
        is_root = module is self._root
        if self.images.note(module, args, kwargs, state.images, outermost, is_root) and state.run is not None:
            state.run.closed = True

    def _begin(self, state: ThreadState, entry: Entry, with_mode: bool) -> None:
        if with_mode and state.mode is None:
            graph = None if self._graph_from is None else self._starts_graph
            mode = AttentionMode(
                self._report, self._report_unknown, self._double_backward, graph, self._record_products
            )
            mode.__enter__()
            state.mode = mode
            entry.opened_mode = True
        state.entries.append(entry)

    def _close(self, state: ThreadState, entry: Entry) -> None:
        if entry.visit is not None:
            entry.visit.frame = None
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
            self._outside += [f"{name}: {what}" for what in unmet]

    @staticmethod
    def _fail(state: ThreadState) -> None:
        if state.run is not None and not state.run.closed:
            state.run.failed = True
        state.coming = Run()

    def _drop_interrupted(self, state: ThreadState) -> None:
        """Clears what a KeyboardInterrupt or SystemExit left behind: entries whose forward is no longer on the
        stack."""
        while state.entries and not is_running(state.entries[-1].frame):
            self._fail(state)
            self._close(state, state.entries.pop())

    # ---- called by the mode

    def _entry(self) -> Entry | None:
        """The innermost module that is running. None where what is seen now is nobody's: a mode that an interruption
        left on this thread, or a recomputation."""
        entries = self._state.entries
        return entries[-1] if entries and is_running(entries[-1].frame) and not entries[-1].recomputes else None

    def _report(self, call: AttentionCall) -> None:
        state, entry = self._state, self._entry()
        if entry is None or not self.index.counts(entry.module) or is_faked():
            return
        module = entry.module
        if not torch.is_grad_enabled() and not self._no_grad:  # turned off within the module's own forward
            self._pass_over(state, module)
            return
        self._attention_modules.add(module)
        run = entry.run
        if run is None or run is not state.run:  # else the module makes several maps in one call
            run = entry.run = self._open_run(state, module)
            run.fired[module] += 1
        run.shapes.append(call.recorded.seen.shape)
        entry.reported = True
        if not self._narrowed:
            before = len(run.windowed)
            run.preceded[module] = run.preceded.get(module, (before, 0))[0], before
        if run.kept:
            given = first_tensor(entry.args, entry.kwargs)
            seen = SeenCall(
                self.index.names[module],
                module,
                call,
                is_cross_attention(entry.args, entry.kwargs),
                None if given is None else given.shape,
            )
            entry.calls = [seen] if entry.calls is None else [*entry.calls, seen]
            run.calls.append(seen)

    def _report_unknown(self, kernel: str) -> None:
        entry = self._entry()
        if entry is not None and self.index.counts(entry.module):
            entry.reported = True
            self._unknown_modules.add(entry.module)
            self._state.current.unknown.append((self.index.names[entry.module], kernel))

    def _starts_graph(self) -> bool:
        """Whether the coming layer is high enough to be the first on a graph."""
        assert self._graph_from is not None
        first = self._graph_from if self._graph_from >= 0 else self.last_count + self._graph_from
        return torch.is_grad_enabled() and self._entry() is not None and len(self._state.current.calls) >= first

    def _open_run(self, state: ThreadState, module: nn.Module) -> Run:
        """The run this call belongs to: a new one once a module has fired as often as it is registered."""
        run = state.run
        if run is not None and not run.closed and not run.failed and run.fired[module] < self.index.registered[module]:
            return run
        if run is not None:
            run.closed = True
        visit = state.coming.visit
        run, state.coming = state.coming, Run(visit=visit)
        state.run = run
        self.runs_started += 1
        run.images = state.images.size
        if state.images.module is not None:
            self.images.modules.add(state.images.module)
        state.images.reset()
        finished = [r for r in self._runs if not r.failed]
        if self.keep in ("only", "last"):
            for earlier in finished:
                earlier.release()
            finished = finished[-(_NAMED_AT_MOST - 1) :]  # warm-up steps that nobody takes must not pile up
        if self.keep == "first" and finished:
            run.release()
        else:
            self._runs = [*finished, run]
        return run

    # ---- called by the handle

    def finish(self) -> tuple[list[Run], tuple[tuple[str, str], ...]]:
        """The runs since the last call, and everything they skipped; from now on only attention modules are watched."""
        self._drop_interrupted(self._state)
        # Copies, because a thread still refers to the run it was last in, and must not keep its tensors.
        runs = [replace(run, calls=list(run.calls)) for run in self._runs if run.is_whole]
        self.clear()
        if not self._narrowed:
            for run in runs:
                self.index.trace(run.windowed, run.images, run.preceded)
        refused = any(self.checkpointed(run) for run in runs)  # and is to be in later steps, by all that was watched
        if self._attention_modules and not self._narrowed and not self._state.entries and not refused:
            self._alike = self.index.alike(self._attention_modules) | self._unknown_modules
            self._hooks.watch_only([self._root, *self.images.modules, *self._alike, *self.index.likely])
            self._narrowed = True
        return runs, tuple(skip for run in runs for skip in run.skipped)

    def joined(self) -> list[str]:
        """Modules that may be attention and joined the model since the capture began."""
        return self.index.joined(self._attention_modules)

    def unseen(self, run: Run) -> list[str]:
        """Modules of this run that look like attention and in which none was seen, or only an unknown kernel."""
        silent = (run.silent & self.index.alike(self._attention_modules)) - run.fired.keys() if run.silent else set()
        unknown = dict.fromkeys(f"{name} ({kernel})" for name, kernel in run.unknown)
        return [*unknown, *(self.index.names[m] for m in silent)]

    def beside(self, run: Run) -> list[tuple[str, str]]:
        """(name, reason) of modules of this run that may be attention of which nothing was seen."""
        names = self.index.beside(run.silent, run.fired)
        return [(name, "nothing was seen in it: no attention, or by another kernel") for name in names]

    def checkpointed(self, run: Run) -> list[str]:
        """Modules of this run whose graph reentrant checkpointing hides."""
        return [self.index.names[m] for m in run.reentrant if self.index.counts(m)]

    def counted(self, runs: list[Run]) -> str:
        """How many runs there were: of those that nobody takes only the last few are remembered."""
        return f"{len(runs)} or more" if len(runs) >= _NAMED_AT_MOST and self.keep == "only" else str(len(runs))

    def clear(self) -> None:
        for run in self._runs:
            run.closed = True
            run.release()
        self._runs = []
        self.runs_started = 0

    def stop(self) -> None:
        state = self._state
        self._drop_interrupted(state)
        while state.entries:  # in the middle of a forward
            self._close(state, state.entries.pop())
        self._hooks.remove()
        self.clear()

    def nothing_captured(self, skipped: Iterable[tuple[str, str]]) -> str:
        reasons = [*(f"{name}: {reason}" for name, reason in skipped), *dict.fromkeys(self._outside)]
        without_grad, self._without_grad, self._outside = self._without_grad, 0, []
        if without_grad:
            reasons.append(
                f"{without_grad} module calls ran under torch.no_grad (capture with no_grad=True to record them; "
                "reentrant checkpointing also runs its forward without a graph: use_reentrant=False)"
            )
        named = self.index.named_attention()
        if named and not any(name.partition(" ")[0] in reason for name in named for reason in reasons):
            reasons.append(f"nothing of the kind was seen in {', '.join(named[:3])}{' and more' * (len(named) > 3)}")
        return (
            f"found no token-to-token attention of {type(self._root).__name__} since the last "
            f"take{' (' + '; '.join(reasons) + ')' if reasons else ''}; expected at least one layer that goes through "
            "F.scaled_dot_product_attention, softmax and matmul, or nn.MultiheadAttention; run this model (not a "
            "copy, nor a compiled or traced one) before take(), and take() once per forward"
        )
