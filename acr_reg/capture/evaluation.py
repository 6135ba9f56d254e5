"""Runs a model and restores what its modules had, whatever interrupts the block: flags, or buffers and attributes. Says
which errors come from the size of a view."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from acr_reg._torch_private import replace_buffers
from acr_reg.errors import CaptureError, LayoutError, SizeError


class _Restored(ABC):
    """Restores flags when its block is left. If an interruption hits just then, it does so when it is dropped."""

    @abstractmethod
    def restore(self) -> None:
        """Restores every flag. May be called again."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __del__(self) -> None:
        self.restore()


class eval_mode(_Restored):
    """Sets eval mode inside the block, and restores every module's mode afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self._modes[0][0].eval()

    def restore(self) -> None:
        """Restores every module's mode."""
        if self._modes and self._modes[0][1]:
            self._modes[0][0].train()  # a train() of its own may undo what eval() did, such as merging weights
        for module, training in self._modes:
            module.training = training
        self._modes = []


class frozen(_Restored):
    """Freezes every parameter inside the block, and restores it afterwards; ``restore()`` does so earlier."""

    def __init__(self, model: nn.Module) -> None:
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __enter__(self) -> frozen:
        for parameter in self._learning:
            parameter.requires_grad_(False)
        return self

    def restore(self) -> None:
        """Makes the parameters learn again."""
        for parameter in self._learning:
            parameter.requires_grad_(True)
        self._learning = []


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Inside the block the modules have copies of their buffers; afterwards they have the buffers and attributes of
    before, whatever a forward wrote, assigned or registered.

    The buffers are not written to and restored: an earlier graph may need them, and its backward would refuse."""
    copies: dict[Tensor, Tensor] = {}  # modules that share a buffer share its copy

    def copy(buffer: Tensor) -> Tensor:
        if buffer not in copies:
            copies[buffer] = buffer.clone()
        return copies[buffer]

    # The attributes of these are those of the step and not of the model.
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    kept = [(module, dict(vars(module))) for module in model.modules() if not isinstance(module, wrappers)]
    try:
        for module, _ in kept:
            replace_buffers(module, copy)
        yield
    finally:
        for module, attributes in kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


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
