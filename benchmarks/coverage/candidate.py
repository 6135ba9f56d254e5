"""A row of the coverage table before it is measured: how its model is built, fed and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Candidate:
    """One row of the table; models.py explains ``expected``, ``kind`` and ``note``."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor] | tuple[Any, ...]]
    logits: Callable[[Any], Tensor]
    expected: int
    kind: str
    grids: bool
    note: str = ""


def images_of(size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, size, size),)


def named(name: str, variant: str) -> str:
    return f"{name} ({variant})" if variant else name


def tensor_of(output: Any) -> Tensor:
    """The first tensor of a model's output, averaged over all axes but batch and channels (last, or second of 4)."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if output.ndim == 4:
        return output.mean((2, 3))
    return output.mean(1) if output.ndim == 3 else output
