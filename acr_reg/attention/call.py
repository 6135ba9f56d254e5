"""One record of an attention call: what a kernel left behind, where, and what its module was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acr_reg.attention.layer import RecordedTensors


@dataclass(eq=False, slots=True)
class AttentionCall:
    """One use of attention. ``refusal`` says why it is not token-to-token self-attention; None where it may be.

    ``value_width`` is the length of a value's last axis, ``value_in_columns`` says that its last axis but one is the
    one of neighbours in memory.
    """

    recorded: RecordedTensors
    value_width: int | None = None
    value_in_columns: bool = False
    dropout: float = 0.0
    stochastic: bool = True
    refusal: str | None = None

    @property
    def key_count(self) -> int:
        recorded = self.recorded
        return recorded.seen.shape[-1] if recorded.key is None or recorded.map is not None else recorded.key.shape[-2]


@dataclass(eq=False, slots=True)
class SeenCall:
    """An attention call, where it was made and what its module took in and gave out."""

    name: str
    module: nn.Module
    call: AttentionCall
    cross: bool
    input_shape: torch.Size | None
    output_shape: torch.Size | None = None

    @property
    def sort(self) -> tuple[Any, ...]:
        """Calls of one sort have their tokens in the same places."""
        call, recorded = self.call, self.call.recorded
        value = call.value_width, call.value_in_columns
        shapes = recorded.seen.shape, call.key_count, self.input_shape, self.output_shape
        return self.name, self.cross, call.refusal, recorded.heads, recorded.map is None, value, shapes
