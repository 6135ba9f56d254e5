"""The base of every handle on a hooked model: it is removed once, by hand or by leaving its ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Removable")


class Removable(ABC):
    """Hooks a model until :meth:`remove` is called or its ``with`` block is left."""

    @abstractmethod
    def remove(self) -> None:
        """Removes every hook. May be called again."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
