"""Computes the gradient of class maps at the class token alone, where a model treats its other tokens apart from it.

Between the attention of one layer and that of the next, and behind the last, most transformers treat each token by
itself. Maps of the last two layers read the gradient at the class token. It then depends on the gradients at this token
alone, and linear layers and fused attention, most of a backward pass, need not compute those at the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from acr_reg._tensors import at_least_float32
from acr_reg.capture.kernels import sdpa_arguments
from acr_reg.tokens import TokenLayout


class ClassRows(TorchFunctionMode):
    """Runs a forward whose gradient is that of the class token, and of its like, alone.

    Its first forward, of one image, shows which linear layers run on (B, N, d). Later ones spare no others: the first
    axis of (N, B, d) may be as long as the batch.
    """

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self._rows = rows
        self._weights: dict[int, Tensor] = {}
        self._batch, self._is_first = 0, True

    @classmethod
    def of(cls, layouts: Sequence[TokenLayout], query: str) -> ClassRows | None:
        """None if maps of these layers read other rows too, or if the tokens beside the patches are apart."""
        if query != "class" or len(layouts) > 2 or len({*layouts}) > 1:
            return None
        rows = _other_tokens(layouts[0])
        return None if rows is None else cls(rows)

    def of_batch(self, size: int) -> ClassRows:
        """The mode for a forward of so many images."""
        self._is_first = not self._batch
        self._batch = size
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and self._spares_linear(*args):
            return _Linear.apply(self._rows, *args)
        if func is F.scaled_dot_product_attention:
            query, key, value, mask, dropout, causal, scale = sdpa_arguments(*args, **(kwargs or {}))
            if mask is None and not dropout and not causal and self._spares_attention(query, key, value):
                return _Attention.apply(self._rows, query, key, value, scale)
        return func(*args, **(kwargs or {}))

    def _spares_linear(self, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        if not given.requires_grad or weight.requires_grad or given.ndim != 3 or len(given) != self._batch:
            return False
        if self._is_first:
            self._weights[id(weight)] = weight
        return self._weights.get(id(weight)) is weight

    def _spares_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        has_graph = query.requires_grad or key.requires_grad or value.requires_grad
        return has_graph and query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]


def _other_tokens(layout: TokenLayout) -> slice | None:
    """The tokens that are not patches, if they stand together at either end; None else."""
    if layout.between or bool(layout.num_prefix_tokens) == bool(layout.num_suffix_tokens):
        return None
    return slice(0, layout.num_prefix_tokens) if layout.num_prefix_tokens else slice(-layout.num_suffix_tokens, None)


def same_gradients(ours: Sequence[Tensor | None], ordinary: Sequence[Tensor | None]) -> bool:
    """Whether both are the same up to rounding, and not all 0, which would tell nothing."""
    tells = False
    for a, b in zip(ours, ordinary, strict=True):
        if a is None or b is None:
            return False
        allowed = max(1e-4, 4 * torch.finfo(b.dtype).eps)
        off, most = torch.stack([(a - b).abs().max(), b.abs().max()]).tolist()
        if not off <= allowed * most:
            return False
        tells = tells or most > 0
    return tells


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: slice, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.rows = rows
        return F.linear(given, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        found = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        found[:, ctx.rows] = gradient[:, ctx.rows] @ weight.to(gradient.dtype)
        return None, found, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: slice, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scale = rows, 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value = map(at_least_float32, ctx.saved_tensors)
        given, asked = at_least_float32(gradient[:, :, ctx.rows]), query[:, :, ctx.rows] * ctx.scale
        with torch.autocast(query.device.type, enabled=False):
            attended = (asked @ key.mT).softmax(-1)
            by_map = given @ value.mT
            by_scores = attended * (by_map - (by_map * attended).sum(-1, keepdim=True))
            by_query = torch.zeros_like(query)
            by_query[:, :, ctx.rows] = by_scores @ key * ctx.scale
            found = by_query, by_scores.mT @ asked, attended.mT @ given
        return None, *(each.to(gradient.dtype) for each in found), None
