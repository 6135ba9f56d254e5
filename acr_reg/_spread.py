"""Attention applied to maps: A M of one layer, by the kernel where it is fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from acr_reg._tensors import at_least_float32
from acr_reg.attention import LayerAttention


def spread_over_patches(layer: LayerAttention, values: Tensor) -> Tensor:
    """mean_h A[patches, patches] @ ``values``, (B, N, C) -> (B, N, C)."""
    prefix = layer.layout.num_prefix_tokens
    if (explicit := layer.explicit) is not None:
        # Head by head: of half precision a copy in float32 would be twice as large as what the model holds.
        spread = [at_least_float32(head[:, prefix:, prefix:]).to(values.dtype) @ values for head in explicit.unbind(1)]
        return torch.stack(spread).mean(0)
    query, key = layer.query, layer.key
    assert query is not None and key is not None
    query, key = at_least_float32(query)[:, :, prefix:], at_least_float32(key)
    mask = layer.batched_mask()
    if mask is not None:
        mask = mask.expand(-1, -1, layer.shape[2], -1)[:, :, prefix:]
        mask = mask if mask.dtype == torch.bool else mask.to(query)
    # Kernels are fast for values as wide as the heads; other widths fall back to one that forms the map. Prefix tokens
    # carry nothing.
    width = query.shape[-1]
    spread = []
    for chunk in values.to(query.dtype).split(width, -1):
        padded = F.pad(chunk, (0, width - chunk.shape[-1], prefix, 0))
        padded = padded[:, None].expand(-1, query.shape[1], -1, -1)
        result = F.scaled_dot_product_attention(query, key, padded, mask, scale=layer.recorded.scale)
        spread.append(result.mean(1)[..., : chunk.shape[-1]])
    return torch.cat(spread, -1)
