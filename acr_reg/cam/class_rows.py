"""Computes the gradient of class maps at the class token alone, where a model treats its other tokens apart from it.

Between the attention of one layer and that of the next, and behind the last, most transformers treat each token by
itself. Maps of the last two layers read the gradient at the class token. It then depends on the gradients at this token
alone, and linear layers and fused attention, most of a backward pass, need not compute those at the patches.

A gradient that is left out is NaN where the ordinary one may not be 0. NaN spreads through every operation that mixes
tokens, whatever its weights are, so maps without NaN needed no gradient that was left out.
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
    """Runs a forward of ``batch`` images whose gradient is that of the class token, and of its like, alone."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self._rows, self.batch = rows, 0

    @classmethod
    def of(cls, layouts: Sequence[TokenLayout], query: str) -> ClassRows | None:
        """None if maps of these layers read other rows too, or if the tokens beside the patches are apart."""
        if query != "class" or len(layouts) > 2 or len({*layouts}) > 1:
            return None
        rows = _other_tokens(layouts[0])
        return None if rows is None else cls(rows)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and self._spares_linear(*args):
            return _Linear.apply(self._rows, *args)
        if func is F.scaled_dot_product_attention:
            query, key, value, mask, dropout, causal, scale = sdpa_arguments(*args, **(kwargs or {}))
            if mask is None and not dropout and not causal and _spares_attention(query, key, value):
                return _Attention.apply(self._rows, query, key, value, scale)
        return func(*args, **(kwargs or {}))

    def _spares_linear(self, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        # The first axis of (N, B, d) is another.
        return given.requires_grad and not weight.requires_grad and given.ndim == 3 and len(given) == self.batch


def _spares_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    has_graph = query.requires_grad or key.requires_grad or value.requires_grad
    return has_graph and query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]


def _other_tokens(layout: TokenLayout) -> slice | None:
    """The tokens that are not patches, if they stand together at either end; None else."""
    if layout.between or bool(layout.num_prefix_tokens) == bool(layout.num_suffix_tokens):
        return None
    return slice(0, layout.num_prefix_tokens) if layout.num_prefix_tokens else slice(-layout.num_suffix_tokens, None)


def _left_out(gradient: Tensor, rows: slice) -> Tensor:
    """(..., N, 1): NaN beside ``rows`` of a gradient (..., N, d) where it is not 0, and 0 elsewhere."""
    sizes = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)  # less than 1e-22 counts as 0
    sizes[..., rows, :] = 0
    return torch.zeros_like(sizes).masked_fill(sizes != 0, torch.nan)


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
        found = _left_out(gradient, ctx.rows).repeat(1, 1, weight.shape[1])
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
        left_out = _left_out(gradient, ctx.rows)
        with torch.autocast(query.device.type, enabled=False):
            attended = (asked @ key.mT).softmax(-1)
            by_map = given @ value.mT
            by_scores = attended * (by_map - (by_map * attended).sum(-1, keepdim=True))
            by_query = left_out.to(query).repeat(1, 1, 1, query.shape[-1])
            by_query[:, :, ctx.rows] = by_scores @ key * ctx.scale
            of_keys = left_out.sum(2, keepdim=True)  # which every query reads
            found = by_query, by_scores.mT @ asked + of_keys, attended.mT @ given + of_keys
        return None, *(each.to(gradient.dtype) for each in found), None
