"""Sorts what the hooks and the mode see of one model into encoder runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acr_reg._hooks import HookSet, in_backward, is_running
from acr_reg._interception import AttentionCall, AttentionMode
from acr_reg.tokens import LayoutError, ModelFields, TokenLayout, infer_layout, read_fields

Keep = Literal["only", "first", "last", "all"]

_PADDED_AT_MOST = 64  # pixels, no patch is larger
_NAMED_AT_MOST = 8  # runs that an error about too many of them lists


@dataclass(eq=False)
class Run:
    """One pass through an encoder: its calls, until it ends or its tensors are released."""

    images: tuple[int, int, int] | None = None
    calls: list[tuple[str, AttentionCall]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fired: Counter[nn.Module] = field(default_factory=Counter)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    kept: bool = True
    failed: bool = False
    closed: bool = False

    def summary(self) -> str:
        return f"{len(self.shapes)} attention calls, the first on {self.shapes[0]}" if self.shapes else "none"

    def release(self) -> None:
        self.kept = False
        self.calls.clear()


@dataclass(eq=False)
class _Entry:
    module: nn.Module
    frame: FrameType


class _ThreadState(threading.local):
    """The hooked modules now running on this thread, innermost last, and the run they belong to."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.mode: AttentionMode | None = None
        self.run: Run | None = None
        self.images: tuple[int, int, int] | None = None
        self.image_module: nn.Module | None = None
        self.seen: Tensor | None = None
        self.given: tuple[int, int, int] | None = None  # (B, H, W) that the outermost module was given


class Recorder:
    """Watches the modules of one model and sorts their attention calls into runs."""

    def __init__(
        self, model: nn.Module, within: list[nn.Module] | None, keep: Keep, no_grad: bool, double_backward: bool
    ) -> None:
        self.model = model
        self.keep = keep
        self._no_grad = no_grad
        self._double_backward = double_backward
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._registered = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._within = None if within is None else {m for root in within for m in root.modules()}
        self._batch_norms = [m for m in self._names if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._fields: ModelFields | None = None
        self._layouts: dict[Any, TokenLayout | str] = {}
        self._attention_modules: set[nn.Module] = set()
        self._image_modules: set[nn.Module] = set()
        self._runs: list[Run] = []
        self._without_grad = 0
        self.padding: str | None = None  # the warning that is due where the model pads its images
        self._state = _ThreadState()
        self._hooks = HookSet(self)
        # Until the first run is taken every module is watched; then only those that turned out to matter.
        self._hooks.watch_only(self._names)

    # ---- called by the hooks

    def entered(self, module: nn.Module, args: tuple[Any, ...], frame: FrameType) -> None:
        state = self._state
        self._drop_interrupted(state)
        if not torch.is_grad_enabled() and not self._no_grad:
            self._without_grad += 1
            return
        if in_backward():  # checkpointing recomputes what the first pass has already shown
            return
        self._note_images(module, args, state)
        if not state.entries:
            state.mode = AttentionMode(self._report, self._double_backward)
            state.mode.__enter__()
        state.entries.append(_Entry(module, frame))

    def left(self, module: nn.Module, failed: bool) -> None:
        state = self._state
        if not state.entries or state.entries[-1].module is not module:
            return
        if failed and state.run is not None:
            state.run.failed = True
        state.entries.pop()
        if not state.entries:
            self._leave_mode(state, self._names[module])

    def _drop_interrupted(self, state: _ThreadState) -> None:
        """Clears what a KeyboardInterrupt or SystemExit left behind: entries whose forward is no longer on the
        stack."""
        if not state.entries or is_running(state.entries[-1].frame):
            return
        if state.run is not None:
            state.run.failed = True
        while state.entries and not is_running(state.entries[-1].frame):
            state.entries.pop()
        if not state.entries:
            self._leave_mode(state, "")

    def _leave_mode(self, state: _ThreadState, name: str) -> None:
        mode, state.mode = state.mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        state.seen = None
        unmet = mode.forget()
        if unmet and state.run is not None:
            state.run.skipped.append((name, f"a softmax over {tuple(unmet[0].shape)} that met no values"))

    def _note_images(self, module: nn.Module, args: tuple[Any, ...], state: _ThreadState) -> None:
        """Finds the images of the coming run: what the outermost module is given, and the innermost one that reads it.

        A convolution over at most 4 channels reads images too, resized or normalised on the way. Elsewhere a (B, C, H,
        W) tensor may just as well be the queries of three heads.
        """
        first = args[0] if args else None
        if not isinstance(first, Tensor) or first.ndim != 4 or first.shape[1] > 4 or not first.is_floating_point():
            return
        size = (first.shape[0], first.shape[2], first.shape[3])
        reads_images = isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        if state.entries and first is not state.seen and not reads_images:
            return
        if not state.entries:
            state.given = size
        elif state.given is not None and state.given != size and size[0] == state.given[0]:
            self._note_padding(state.given, size)
        if state.run is not None:
            state.run.closed = True
        state.seen = first
        state.images = size
        state.image_module = module

    def _note_padding(self, given: tuple[int, int, int], read: tuple[int, int, int]) -> None:
        """Padding to whole patches moves the tokens of a flipped image; resizing does not, and changes more."""
        added = [read[i] - given[i] for i in (1, 2)]
        if min(added) >= 0 and max(added) < _PADDED_AT_MOST:
            self.padding = (
                f"found images of {given[1]} x {given[2]} px that the model pads to {read[1]} x {read[2]}, so the "
                f"tokens of a flipped image lie up to {max(added)} px off those they are matched with; expected whole "
                "patches; resize or crop the images to a multiple of the patch size before both forwards"
            )

    # ---- called by the mode

    def _report(self, call: AttentionCall) -> None:
        state = self._state
        module = state.entries[-1].module
        if self._within is not None and module not in self._within:
            return
        if not torch.is_grad_enabled() and not self._no_grad:  # reentrant checkpointing turns it off within a forward
            self._without_grad += 1
            return
        self._attention_modules.add(module)
        run = self._open_run(state, module)
        run.fired[module] += 1
        run.shapes.append(tuple(call.recorded.seen.shape))
        if run.kept:
            run.calls.append((self._names[module], call))

    def _open_run(self, state: _ThreadState, module: nn.Module) -> Run:
        """The run this call belongs to: a new one once a module has fired as often as it is registered."""
        run = state.run
        if run is not None and not run.closed and not run.failed and run.fired[module] < self._registered[module]:
            return run
        if run is not None:
            run.closed = True
        run = state.run = Run(images=state.images)
        if state.image_module is not None:
            self._image_modules.add(state.image_module)
        # What comes without an image of its own must not inherit one.
        state.images = state.image_module = state.seen = None
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
        runs = [replace(run, calls=list(run.calls)) for run in self._runs if not run.failed]
        self.clear()
        if self._attention_modules and not self._state.entries:
            kinds = {type(m) for m in self._attention_modules}
            alike = [m for m in self._names if type(m) in kinds]
            self._hooks.watch_only([*self._image_modules, *self._attention_modules, *alike])
        return runs, tuple(skip for run in runs for skip in run.skipped)

    def counted(self, runs: list[Run]) -> str:
        """How many runs there were: of those that nobody takes only the last few are remembered."""
        return f"{len(runs)} or more" if len(runs) >= _NAMED_AT_MOST and self.keep == "only" else str(len(runs))

    def clear(self) -> None:
        for run in self._runs:
            run.closed = True
            run.release()
        self._runs = []

    def stop(self) -> None:
        self._drop_interrupted(self._state)
        self._hooks.remove()
        self.clear()

    def training_batch_norms(self) -> list[str]:
        return [self._names[m] for m in self._batch_norms if m.training]

    def layout(self, num_tokens: int, size: tuple[int, int] | None, hints: tuple[Any, Any, Any]) -> TokenLayout | str:
        """The layout of a layer's tokens, or the message that says why it is not known."""
        if (num_tokens, size) not in self._layouts:
            if self._fields is None:
                self._fields = read_fields(self.model)
            try:
                found: TokenLayout | str = infer_layout(num_tokens, size, self._fields, *hints)
            except LayoutError as error:
                found = str(error)
            self._layouts[num_tokens, size] = found
        return self._layouts[num_tokens, size]

    def nothing_captured(self, skipped: Iterable[tuple[str, str]]) -> str:
        reasons = [f"{name}: {reason}" for name, reason in skipped]
        without_grad, self._without_grad = self._without_grad, 0
        if without_grad:
            reasons.append(
                f"{without_grad} module calls ran under torch.no_grad (capture with no_grad=True to record them; "
                "reentrant checkpointing also runs its forward without a graph: use_reentrant=False)"
            )
        return (
            f"found no token-to-token attention of {type(self.model).__name__} since the last "
            f"take{' (' + '; '.join(reasons) + ')' if reasons else ''}; expected at least one layer that goes through "
            "F.scaled_dot_product_attention, softmax and matmul, or nn.MultiheadAttention; run this model (not a "
            "copy, nor a compiled or traced one) before take(), and take() once per forward"
        )
