"""Decides at which tensors a graph starts, and remembers them: checkpointing must start it at the same ones again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor, nn


class GraphStarts:
    """The tensors at which a capture started a graph, and the modules that ran around each.

    Checkpointing repeats a part of the forward in the backward, which must start the graph where the forward did. The
    repeated tensor is told by its module and, because a module may run several times, by its values.
    """

    def __init__(self, graph_from: int | None) -> None:
        self.graph_from = graph_from
        self.last_count = 0  # layers of the last run taken, for a negative graph_from
        self._known: dict[int, tuple[weakref.ref[Tensor], frozenset[nn.Module]]] = {}
        self._numbers = count()

    def begin(self, tensor: Tensor, layer: int, around: Iterable[nn.Module]) -> bool:
        """Whether the graph starts at this tensor of a layer, the first at ``graph_from`` or above. Remembers the
        tensor while its graph lives."""
        first = self.graph_from
        if first is None or layer < (first if first >= 0 else self.last_count + first):
            return False
        known, number = self._known, next(self._numbers)
        known[number] = weakref.ref(tensor, lambda _: known.pop(number, None)), frozenset(around)
        return True

    def has(self, tensor: Tensor, module: nn.Module) -> bool:
        """Whether ``tensor``, computed in ``module``, repeats one of them."""
        started = [known() for known, around in list(self._known.values()) if module in around]
        return any(other is not None and _is_copy(other.detach(), tensor) for other in started)


def _is_copy(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
