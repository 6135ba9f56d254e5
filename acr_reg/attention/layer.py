"""The attention of one layer: the factors or the map that the model itself computed, on its autograd graph.

With queries Q, keys K, values V (B, H, N | M, d), a layer's map is A = softmax(scale Q K^T + bias), (B, H, N, M), and
its output O = A V (Vaswani et al. 2017, eq. 1). A fused kernel leaves Q, K, V and O; an unfused layer leaves A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from acr_reg._tensors import at_least_float32, select
from acr_reg.errors import LayoutError
from acr_reg.tokens import TokenLayout, Window

_BLOCK_ELEMENTS = 2**20  # of maps: 4 MB in float32; a block holds a few times as many

# The minimum: each block forms a gradient with respect to all keys, as large as d rows of the maps (64 in most models).
# Blocks of 3 rows took six times as long as blocks of 32.
LEAST_ROWS = 64


@dataclass(frozen=True, eq=False, repr=False)
class RecordedTensors:
    """The tensors of one layer on their graph, in the model's own shapes: (B, H, N, d), (B, N, d) or (B H, N, M).

    A fused kernel leaves ``query`` and ``key``, an unfused layer its ``map``; checks see both. ``heads`` unflattens
    (B H, ...). ``mask`` is the kernel's: additive, or boolean with True for keys that take part. ``kernel`` names a
    function of xformers or flash_attn. Its ``output`` stays (B, N, H, d): the logits do not depend on a view of it.
    ``sharded``: whether FSDP gathers the model's parameters for a backward, which must then come through the model's
    output.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    map: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    heads: int | None = None
    kernel: str | None = None
    sharded: bool = False

    def __repr__(self) -> str:
        shapes = [f"{name}={tuple(kept.shape)}" for name, kept in vars(self).items() if isinstance(kept, Tensor)]
        return f"RecordedTensors({', '.join(shapes)})"

    @property
    def seen(self) -> Tensor:
        """The map, or the query of a fused kernel: one of them is always there."""
        tensor = self.map if self.map is not None else self.query
        assert tensor is not None
        return tensor

    def detach(self) -> RecordedTensors:
        tensors: dict[str, Any] = {
            name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False, repr=False)
class LayerAttention:
    """The self-attention of one layer: query and key, or the map itself, and the layout of its tokens.

    ``index`` counts the captured layers of the run from 0; ``name`` is the module's. ``stochastic``: whether the map's
    rows are probabilities. ``dropout``: the attention dropout that was active on them. ``images`` selects a part of
    the batch; the recorded tensors stay whole, because only tensors on the graph have a gradient.
    """

    index: int
    name: str
    recorded: RecordedTensors
    placed: TokenLayout | None
    """The layout of its tokens; None if unknown, with the reason in ``why_unplaced``."""
    dropout: float = 0.0
    stochastic: bool = True
    images: slice = field(default_factory=lambda: slice(None))
    window: Window | None = None
    why_unplaced: str | None = None

    def __repr__(self) -> str:
        what = f"{self.kind}, {'query and key' if self.is_factored else 'map'} of {self.shape}"
        where = self.window or self.placed or "grid unknown"
        kept = self.recorded.seen
        return f"LayerAttention({self.index}, {self.name}: {what}; {where}; {kept.dtype} on {kept.device})"

    @property
    def kind(self) -> Literal["global", "window", "reduced keys", "reduced queries"]:
        """Whether tokens attend to all others, to their window, or to a coarser or finer grid."""
        if self.window is not None:
            return "window"
        queries, keys = self.shape[2:]
        return "global" if queries == keys else "reduced keys" if keys < queries else "reduced queries"

    @property
    def layout(self) -> TokenLayout:
        """The :class:`~acr_reg.TokenLayout`. Raises :class:`~acr_reg.LayoutError` with the reason if unknown."""
        if self.placed is None:
            raise LayoutError(f"layer {self.index} ({self.name}): {self.why_unplaced}")
        return self.placed

    @property
    def device(self) -> torch.device:
        return self.recorded.seen.device

    @property
    def is_factored(self) -> bool:
        return self.recorded.map is None

    @property
    def query(self) -> Tensor | None:
        """(B, H, N, d), or None for an explicit map."""
        return self.batched(self.recorded.query)

    @property
    def key(self) -> Tensor | None:
        """(B, H, M, d), or None for an explicit map. Grouped keys are repeated for each query head."""
        return self._per_query_head(self.batched(self.recorded.key))

    @property
    def value(self) -> Tensor | None:
        """(B, H, M, d), or None for an explicit map. Grouped values are repeated for each query head."""
        return self._per_query_head(self.batched(self.recorded.value))

    @property
    def output(self) -> Tensor | None:
        """A V, (B, H, N, d), of a fused kernel; None for an explicit map."""
        return self.batched_output(self.recorded.output)

    @property
    def explicit(self) -> Tensor | None:
        """The map that met V before dropout, (B, H, N, M), or None for a fused layer."""
        return self.batched(self.recorded.map)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)"""
        if (explicit := self.explicit) is not None:
            batch, heads, queries, keys = explicit.shape
        else:
            query, key = self.query, self.key
            assert query is not None and key is not None
            batch, heads, queries, keys = *query.shape[:3], key.shape[2]
        return batch, heads, queries, keys

    def of_images(self, images: Tensor) -> LayerAttention:
        """This layer for these images (n,), in this order, with tensors of its own."""
        recorded = self.recorded
        mask = None if recorded.causal else self.batched_mask()
        mask = mask[images] if mask is not None and mask.shape[0] > 1 else mask
        tensors: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor[images]
            for name in ("query", "key", "value")
        }
        explicit = None if self.explicit is None else self.explicit[images]
        return replace(
            self, recorded=replace(recorded, map=explicit, mask=mask, output=None, **tensors), images=slice(None)
        )

    @property
    def requires_grad(self) -> bool:
        recorded = self.recorded
        return any(t is not None and t.requires_grad for t in (recorded.map, recorded.query, recorded.key))

    def batched(self, tensor: Tensor | None) -> Tensor | None:
        """A recorded tensor, or a gradient of one, as (B, H, ...), for this part of the batch."""
        if tensor is None:
            return None
        if tensor.ndim == 3:
            tensor = rearrange(tensor, "(b h) n m -> b h n m", h=self.recorded.heads or 1)
        elif tensor.ndim > 4:  # windows beside heads
            tensor = tensor.flatten(1, -3)
        # A slice of all images would be the same tensor, with a gradient copied into zeros.
        return tensor if self.images == slice(None) else tensor[self.images]

    def batched_output(self, tensor: Tensor | None) -> Tensor | None:
        """The recorded output or map, or a gradient of it, as (B, H, N, ...), for this part of the batch."""
        if tensor is not None and tensor.ndim == 4 and self.recorded.kernel is not None:
            tensor = tensor.transpose(1, 2)
        return self.batched(tensor)

    def _per_query_head(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        seen = self.batched(self.recorded.seen)
        assert seen is not None
        heads = seen.shape[1]
        # A map that is summed over heads has fewer heads than its values.
        return tensor if tensor.shape[1] >= heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)

    def weights(self, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """The attention map A, (B, H, N, M), at least in float32, on the graph. Its rows are probabilities, but where
        the model changed it after softmax (``stochastic`` is False).

        ``queries`` and ``keys``, token indices (n,) or (B, n), select and reorder rows and columns. With factors they
        do so before any product, so a permuted softmax(Q K^T) costs softmax((PQ)(PK)^T); ``keys`` must then name every
        key once, because a softmax needs all of them.
        """
        if (explicit := self.explicit) is not None:
            return select(select(at_least_float32(explicit), -2, queries), -1, keys)
        return self.logits(queries, keys).softmax(-1)

    def logits(self, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """What a fused layer's map is the softmax of, for :meth:`weights`."""
        query, key = self.query, self.key
        assert query is not None and key is not None
        with torch.autocast(query.device.type, enabled=False):
            query, key = at_least_float32(query), at_least_float32(key)
            scale = self.recorded.scale if self.recorded.scale is not None else 1.0 / math.sqrt(query.shape[-1])
            scores = (select(query, -2, queries) * scale) @ select(key, -2, keys).transpose(-2, -1)
            mask = self.batched_mask()
            if mask is not None:
                per_image = any(index is not None and index.ndim == 2 for index in (queries, keys))
                mask = mask.expand(query.shape[0] if per_image else -1, -1, query.shape[-2], key.shape[-2])
                mask = select(select(mask, -2, queries), -1, keys)
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores)
            return scores

    def batched_mask(self) -> Tensor | None:
        """The kernel's mask for this part of the batch, of four axes that broadcast to (B, H, N, M), or None."""
        mask = self.recorded.mask
        if self.recorded.causal:
            _, _, queries, keys = self.shape
            assert self.recorded.query is not None
            return torch.ones(queries, keys, dtype=torch.bool, device=self.recorded.query.device).tril()[None, None]
        if mask is None:
            return None
        if mask.ndim < 3:
            return mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        assert self.recorded.query is not None
        if mask.ndim > 4:
            return mask.expand(*self.recorded.query.shape[:-2], *mask.shape[-2:]).flatten(1, -3)[self.images]
        if mask.ndim == 3:
            # Masks broadcast from the right: over heads with (B, H, N, d), over the flattened batch with (B H, N, d).
            if self.recorded.query.ndim == 4 or mask.shape[0] == 1:
                return mask[None]
            mask = rearrange(mask, "(b h) n m -> b h n m", h=self.recorded.heads or 1)
        return mask if mask.shape[0] == 1 else mask[self.images]


def rows_of_block(layer: LayerAttention) -> int:
    """The number of query rows to form at a time, of the maps of all images and heads."""
    batch, heads, queries, keys = layer.shape
    return min(queries, max(LEAST_ROWS, _BLOCK_ELEMENTS // (batch * heads * keys)))
