"""Changes flags of a model inside a block and restores them, whatever interrupts the block or the restoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from torch import nn


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
