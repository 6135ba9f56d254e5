"""Runs a model and restores what its modules had: their modes; or their buffers and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from acr_reg._torch_private import replace_buffers


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode inside the block, and restores every module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


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
