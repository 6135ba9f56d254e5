"""One record of an attention call: its tensors, and where in the model it happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from acr_reg.attention.layer import RecordedTensors
from acr_reg.attention.observed import Observed


@dataclass(eq=False, slots=True)
class AttentionCall:
    """One use of attention. The mode that sees the kernel makes it, and the recorder adds its module and shapes.

    ``refusal``: why it is not token-to-token self-attention, or None. ``value_width``: the length of the value's last
    axis. ``value_in_columns``: whether its second-last axis is contiguous in memory. ``cross``: whether the module was
    given keys of other tokens. ``observed``: what the run, or an earlier one, showed of its tokens.
    """

    recorded: RecordedTensors
    value_width: int | None = None
    value_in_columns: bool = False
    dropout: float = 0.0
    stochastic: bool = True
    refusal: str | None = None
    cross: bool = False
    observed: Observed | None = None
    name: str = field(init=False)
    module: nn.Module = field(init=False)
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None

    @property
    def sort(self) -> tuple[Any, ...]:
        """Two calls of the same sort have their tokens in the same places."""
        recorded = self.recorded
        keys = recorded.seen.shape[-1] if recorded.key is None or recorded.map is not None else recorded.key.shape[-2]
        value = self.value_width, self.value_in_columns
        shapes = recorded.seen.shape, keys, self.input_shape, self.output_shape
        return self.name, self.observed, self.cross, self.refusal, recorded.heads, recorded.map is None, value, shapes
