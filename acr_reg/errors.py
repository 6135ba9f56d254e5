"""The errors that users of the library can correct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class CaptureError(RuntimeError):
    """The attention that you asked for was not captured, or cannot be captured."""


class LayoutError(ValueError):
    """The grid or the prefix tokens of a layer are unknown, or more than one fits."""


class SizeError(ValueError):
    """The model fails on a view of another size than its images, as models do that are built for one size."""


class CommandError(Exception):
    """An error that the user of a command can correct, shown as one message without a traceback."""


def listed(name: str, given: Iterable[T]) -> tuple[T, ...]:
    """The values of an argument that takes several. Raises TypeError for one value in place of a list."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        value = repr(given) if isinstance(given, (str, int)) else f"<{type(given).__name__}>"
        raise TypeError(f"{name}={value} is not a list. Pass {name}=[{value}].")
    return tuple(given)


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, for a message that cannot show all of them, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
