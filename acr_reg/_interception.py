"""Sees the attention that a model computes: a TorchFunctionMode that turns kernels and softmaxes into attention calls.

While the mode is entered, F.scaled_dot_product_attention is seen with its factors; a softmax over the last axis is
followed through dropout, casts and mixing to the matmul where it meets V. Nothing is computed twice, replaced or stored
on modules.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from acr_reg.attention import RecordedTensors


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One use of attention. ``refusal`` says why it is not token-to-token self-attention; None where it may be."""

    recorded: RecordedTensors
    dropout: float = 0.0
    stochastic: bool = True
    refusal: str | None = None


@dataclass(eq=False)
class _Trace:
    """A tensor made from a softmax: ``alias`` is kept alive because traces are found by id()."""

    alias: Tensor
    probability: Tensor
    mixed: bool = False
    dropout: float = 0.0


_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_MATMUL_NAMES = {"matmul", "__matmul__", "bmm", "einsum"}
# These change dtype, memory or dropout, never which probability stands where.
_SAME_MAP_NAMES = {
    "dropout",
    "dropout_",
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "contiguous",
    "clone",
}


class _MultiHead(threading.local):
    """What nn.MultiheadAttention says of its products; shared, since only the innermost mode sees its call."""

    heads: int | None = None
    refusal: str | None = None


_inside = _MultiHead()


class AttentionMode(TorchFunctionMode):
    """Reports every :class:`AttentionCall` made on this thread while it is entered."""

    def __init__(self, report: Callable[[AttentionCall], None], math_kernel: bool = False) -> None:
        super().__init__()
        self._report = report
        self._math_kernel = math_kernel
        self._traces: dict[int, _Trace] = {}
        self._met: set[int] = set()  # ids of followed probabilities that met their values

    def forget(self) -> list[Tensor]:
        """Drops the softmaxes being followed and returns those that met no V."""
        unmet = {id(t.probability): t.probability for t in self._traces.values() if id(t.probability) not in self._met}
        self._traces.clear()
        self._met.clear()
        return list(unmet.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            self._softmax(result, *args[1:], **kwargs)
        elif self._traces:
            self._follow(getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def _fused(self, args: Any, kwargs: Any) -> Tensor:
        with math_kernel() if self._math_kernel else nullcontext():
            output: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        query, key, value, mask, dropout, causal, scale = _sdpa_arguments(*args, **kwargs)
        recorded = RecordedTensors(
            query, key, value, output, None, mask, causal, scale, _inside.heads if query.ndim == 3 else None
        )
        self._report(AttentionCall(recorded, dropout, True, _inside.refusal))
        return output

    def _multi_head(self, args: Any, kwargs: Any) -> Any:
        """Runs the function's own body with the mode on: by itself it dispatches once and hides what it does.

        The weights it returns are a view off the path to its output, so they could not be used for a gradient.
        """
        query, key = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key")))
        heads = args[4] if len(args) > 4 else kwargs["num_heads"]
        before = _inside.heads, _inside.refusal
        _inside.heads = heads
        _inside.refusal = None if query is key else "cross-attention: queries and keys are not the same tokens"
        try:
            with self:
                return _open_multi_head(*args, **kwargs)
        finally:
            _inside.heads, _inside.refusal = before

    def _softmax(self, probability: Tensor, dim: int | None = None, *_: Any, **kwargs: Any) -> None:
        dim = kwargs.get("dim", dim)
        if probability.ndim >= 3 and dim in (-1, probability.ndim - 1):
            self._traces[id(probability)] = _Trace(probability, probability)

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        operands = [
            a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)) if isinstance(a, Tensor)
        ]
        traces = [self._traces.get(id(operand)) for operand in operands]
        if not any(traces):
            return
        if name in _MATMUL_NAMES and len(traces) == 2 and (traces[0] is None) != (traces[1] is None):
            trace = traces[0] or traces[1]
            assert trace is not None
            self._met_value(name, trace, operands, transposed=traces[0] is None, output=result)
            return
        if isinstance(result, Tensor) and result.is_floating_point():
            trace = next(t for t in traces if t is not None)
            overwritten = "dropout" in name and any(result is operand for operand in operands)
            same = name in _SAME_MAP_NAMES and result.shape == trace.alias.shape and not overwritten
            # torch.dropout and Tensor.dropout take p as second argument, F.dropout as p=; its place does not matter
            # otherwise.
            dropped = _dropout_of(args, kwargs) if "dropout" in name else 0.0
            self._traces[id(result)] = _Trace(
                result, trace.probability, trace.mixed or not same, max(trace.dropout, dropped)
            )

    def _met_value(self, name: str, trace: _Trace, operands: list[Tensor], transposed: bool, output: Tensor) -> None:
        """The operand that meets V is the effective attention; before dropout where nothing else changed it.

        Its first product is that with V: a later one (a refinement of class maps) is no other layer.
        """
        if id(trace.probability) in self._met:
            return
        self._met.add(id(trace.probability))
        attention = trace.alias if trace.mixed else trace.probability
        plain = name != "einsum" and not transposed
        refusal = _inside.refusal
        if transposed and name != "einsum":
            refusal = "the map is the second operand of its product: attention over channels or a transposed layout"
        recorded = RecordedTensors(
            value=operands[1] if plain else None, output=output if plain else None, map=attention, heads=_inside.heads
        )
        self._report(AttentionCall(recorded, trace.dropout, not trace.mixed, refusal))


def _dropout_of(args: Any, kwargs: Any) -> float:
    """p of an active F.dropout(input, p=0.5, training=True, inplace=False)."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(p) if training else 0.0


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None]:
    return query, key, value, attn_mask, dropout_p, is_causal, scale


def math_kernel() -> AbstractContextManager[Any]:
    """The SDPA kernel whose backward is itself differentiable."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch < 2.3
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


# A copy of the public function's body that skips its one dispatch to modes; torch itself is not touched. Seen on 2.1 to
# 2.14.
_open_multi_head = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
