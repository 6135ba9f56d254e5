"""Runs a model and restores what its modules had, whatever interrupts the block: flags, or buffers and attributes. Says
which errors come from the size of a view."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, takewhile
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from acr_reg._torch_private import replace_buffers
from acr_reg.capture.stacks import stack_of
from acr_reg.errors import CaptureError, LayoutError, SizeError

Self = TypeVar("Self", bound="_Changed")


class _Changed(ABC):
    """Changes a model inside its block, and restores it afterwards.

    Blocks of other threads that share modules with it wait for its end. An interruption may skip that end. The model is
    then restored when the block is dropped or, while a traceback holds it, at the beginning of the next one: the
    function that entered it no longer runs.
    """

    _held: frozenset[nn.Module] = frozenset()  # while they are changed

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def _change(self) -> None: ...

    @abstractmethod
    def _undo(self) -> None:
        """May be called again, after an interruption."""

    def __enter__(self: Self) -> Self:
        self._thread, self._frame = threading.get_ident(), id(sys._getframe(1))  # the frame itself would hold the block
        self._held = frozenset(self.model.modules())
        _BLOCKS[next(_ARRIVALS)] = self
        before = list(takewhile(lambda block: block is not self, _blocks()))
        nested = any(block._thread == self._thread and block._is_running for block in before)
        # The latest first: what it waits for, and restores, has then ended.
        for block in reversed(before):
            if nested and (block._is_running or block._thread != self._thread):
                continue  # to wait while other threads wait for the outer block might be for ever
            while block._held & self._held:
                if not block._is_running:
                    block.restore()
                else:
                    time.sleep(_PAUSE)
        self._change()
        return self

    @property
    def _is_running(self) -> bool:
        return bool(self._held) and any(id(frame) == self._frame for frame in stack_of(self._thread))

    def restore(self) -> None:
        """Restores the model, which ends the block. May be called again."""
        try:
            self._undo()
        except BaseException:  # an interruption
            self._undo()
            raise
        finally:
            self._held = frozenset()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __del__(self) -> None:
        if self._held:
            self.restore()


_BLOCKS: weakref.WeakValueDictionary[int, _Changed] = weakref.WeakValueDictionary()  # in the order of their arrival
_ARRIVALS = count()
_PAUSE = 0.002  # seconds


def _blocks() -> Iterator[_Changed]:
    return (block for reference in _BLOCKS.valuerefs() if (block := reference()) is not None)


class eval_mode(_Changed):
    """Sets eval mode inside the block, and restores every module's mode afterwards."""

    _modes: Sequence[tuple[nn.Module, bool]] = ()
    _learning: Sequence[nn.Parameter] = ()

    def _change(self) -> None:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()

    def freeze(self) -> None:
        """Freezes every parameter for the rest of the block."""
        self._learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self._learning:
            parameter.requires_grad_(False)

    def unfreeze(self) -> None:
        """Makes the parameters learn again that did before :meth:`freeze`."""
        for parameter in self._learning:
            parameter.requires_grad_(True)
        self._learning = ()

    def _undo(self) -> None:
        self.unfreeze()
        if self._modes and self._modes[0][1]:
            self.model.train()  # a train() of its own may undo what eval() did, such as merging weights
        for module, training in self._modes:
            module.training = training
        self._modes = ()


class state_kept(_Changed):
    """Inside the block the modules have copies of their buffers; afterwards they have the buffers and attributes of
    before, whatever a forward wrote, assigned or registered.

    The buffers are not written to and restored: an earlier graph may need them, and its backward would refuse."""

    _kept: Sequence[tuple[nn.Module, dict[str, Any]]] = ()

    def _change(self) -> None:
        copies: dict[Tensor, Tensor] = {}  # modules that share a buffer share its copy

        def copy(buffer: Tensor) -> Tensor:
            if buffer not in copies:
                copies[buffer] = buffer.clone()
            return copies[buffer]

        # The attributes of these are those of the step and not of the model.
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        self._kept = [(m, dict(vars(m))) for m in self.model.modules() if not isinstance(m, wrappers)]
        for module, _ in self._kept:
            replace_buffers(module, copy)

    def _undo(self) -> None:
        for module, attributes in self._kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        self._kept = ()


@contextmanager
def running_view(view: Tensor, images: Tensor) -> Iterator[None]:
    """Runs a model or class maps on a ``view`` of images. An error on a view of another size says how a model takes
    other sizes, because most of them are built for one."""
    try:
        yield
    except (CaptureError, LayoutError, SizeError, Warning, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if view.shape[-2:] == images.shape[-2:]:
            raise
        (height, width), why = view.shape[-2:], str(error).rstrip(".")
        raise SizeError(
            f"The model fails on a view of {height} x {width} px: {why}. Let it take other sizes (timm: "
            "dynamic_img_size=True, dynamic_img_pad=True)."
        ) from error
