"""A fused twin of an explicit model."""

from __future__ import annotations

import copy

from torch import nn

from tests.support.models import MultiheadBlock


def fused_copy(model: nn.Module) -> nn.Module:
    """The same function of the same parameters through the fused kernel."""
    fused = copy.deepcopy(model)
    for index, block in enumerate(model.encoder):
        other = MultiheadBlock(False)
        other.attention.in_proj_weight.data, other.attention.in_proj_bias.data = (
            block.qkv.weight.data,
            block.qkv.bias.data,
        )
        other.attention.out_proj.weight.data, other.attention.out_proj.bias.data = (
            block.proj.weight.data,
            block.proj.bias.data,
        )
        fused.encoder[index] = other.to(block.qkv.weight.dtype)
    return fused
