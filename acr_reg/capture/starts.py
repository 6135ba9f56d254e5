"""Remembers at which tensors a graph was started, so that checkpointing starts it at the same ones again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GraphStarts:
    """The tensors at which a capture started a graph, and the modules that ran around each.

    Checkpointing repeats a part of the forward in the backward, which must start the graph where the forward did. The
    repeated tensor is told by its module and, because a module may run several times, by its values.
    """

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], frozenset[nn.Module]]] = []

    def add(self, tensor: Tensor, around: Iterable[nn.Module]) -> None:
        """Remembers a tensor while its graph lives."""
        self._known = [known for known in self._known if known[0]() is not None]
        self._known.append((weakref.ref(tensor), frozenset(around)))

    def has(self, tensor: Tensor, module: nn.Module) -> bool:
        """Whether ``tensor``, computed in ``module``, repeats one of them."""
        started = [known() for known, around in self._known if module in around]
        return any(other is not None and _is_copy(other.detach(), tensor) for other in started)


def _is_copy(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
