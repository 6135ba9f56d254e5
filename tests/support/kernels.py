"""Stand-ins for xformers and flash_attn, which no machine without a GPU can install: functions of the same signatures,
and a kernel that shows nothing of itself.

Signatures: xformers 0.0.16 to 0.0.35, flash_attn 2.8 and, with ``version=3``, 3.0.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class Opaque(torch.autograd.Function):
    """softmax(scale Q K^T + bias) V of q, k, v (B, H, N, d), forward and backward by hand."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
        scores = q @ k.transpose(-2, -1) * scale
        if bias is not None:
            scores = scores + bias
        dropped = torch.nn.functional.dropout(weights := scores.softmax(-1), p)
        ctx.save_for_backward(q, k, v, weights, dropped)
        ctx.scale = scale
        return dropped @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, dropped = ctx.saved_tensors
        by_weights = gradient @ v.transpose(-2, -1) * torch.where(weights > 0, dropped / weights, 0)
        scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True))
        return (
            scores @ k * ctx.scale,
            scores.transpose(-2, -1) @ q * ctx.scale,
            dropped.transpose(-2, -1) @ gradient,
            scores if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, p: float) -> Tensor:
    """Of (B, N, H, d), with fewer heads of keys than of queries if they divide."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Opaque.apply(q, k, v, bias, scale, p).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


def band(queries: int, keys: int, before: int = -1, after: int = -1) -> Tensor:
    """-inf for keys outside (i - before, i + after); negative is no limit."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    outside = ((j < i - before) & (before >= 0)) | ((j > i + after) & (after >= 0))
    return torch.zeros(queries, keys).masked_fill(outside, -torch.inf)


# ---- xformers.ops


class AttentionBias:
    pass


class LowerTriangularMask(AttentionBias):
    pass


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    pass


class BlockDiagonalMask(AttentionBias):
    pass


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> Tensor:
    bias = band(query.shape[1], key.shape[1], after=0) if isinstance(attn_bias, AttentionBias) else attn_bias
    if query.ndim == 3:
        return _attend(*(t[:, :, None] for t in (query, key, value)), bias, scale, p)[:, :, 0]
    if query.ndim == 5:
        return _attend(*(t.flatten(2, 3) for t in (query, key, value)), bias, scale, p).reshape(query.shape)
    return _attend(query, key, value, bias, scale, p)


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return x.unbind(dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.stack(gradients, ctx.dim), None


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return _Unbind.apply(x, dim)  # type: ignore[no-any-return, no-untyped-call]


# ---- flash_attn


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    before, after = window_size
    output = _attend(q, k, v, band(q.shape[1], k.shape[1], before, 0 if causal else after), softmax_scale, dropout_p)
    return (output, output.new_zeros(1), None) if return_attn_probs else output


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    return flash_attn_func(*qkv.unbind(2), dropout_p, softmax_scale, causal, window_size)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    return flash_attn_func(q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    parts = [flash_attn_func(*(t[a:b][None] for t in (q, k, v))) for a, b in pairwise(starts.tolist())]
    return torch.cat([part[0] for part in parts])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    return _one_by_one(q, k, v, cu_seqlens_q)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Any:
    return _one_by_one(*qkv.unbind(1), cu_seqlens)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
) -> Any:
    return _one_by_one(q, *kv.unbind(1), cu_seqlens_q)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None) -> Tensor:
    return flash_attn_func(q, k_cache, v_cache)  # type: ignore[no-any-return]


def _flash_attn_func_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    return _attend(q, k, v, None, softmax_scale, 0.0)


def install(patch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where the packages would be, for one test."""
    here = globals()
    flash = [name for name in here if name.startswith("flash_attn_")]
    contents = {
        "xformers": {},
        "xformers.ops": {
            name: here[name]
            for name in ("memory_efficient_attention", "unbind", "LowerTriangularMask", "AttentionBias")
        },
        "flash_attn": {name: here[name] for name in flash},
        "flash_attn.flash_attn_interface": {name: here[name] for name in flash},
        "flash_attn.bert_padding": {"pad_input": None, "unpad_input": None},
        "flash_attn_interface": {"flash_attn_func": _flash_attn_func_3},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]  # type: ignore[attr-defined]
