"""Follows the scores of attention to the map that meets V, and reports every attention call of a model.

While the mode is entered, it sees F.scaled_dot_product_attention with its factors. Elsewhere it follows scores from the
product of queries and keys through bias and mask to the softmax, and probabilities through dropout, casts and mixing to
the product with V. It computes nothing twice, replaces nothing and stores nothing on modules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg._torch_private import math_kernel, never_traced
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors
from acr_reg.capture import kernels
from acr_reg.capture.kernels import ROLES, Role, learn_role


@dataclass(frozen=True, eq=False)
class _Followed:
    """A tensor on the way from the scores to V. ``probability`` is None before the softmax.

    ``alias`` refers to the tensor weakly: followed are found by id(), which Python uses again once a tensor is gone.
    """

    alias: weakref.ref[Tensor]
    factors: tuple[Tensor, Tensor] | None = None  # query and key, for checks
    probability: Tensor | None = None
    sources: frozenset[int] = frozenset()  # ids of all probabilities that went into it
    transposed: bool = False  # keys on the last axis but one
    reshaped: bool = False
    mixed: bool = False
    dropout: float = 0.0
    refusal: str | None = None


class _MultiHead(threading.local):
    """What nn.MultiheadAttention knows about its products. Shared: only the innermost mode sees its call."""

    heads: int | None = None
    refusal: str | None = None


_inside = _MultiHead()


class AttentionMode(TorchFunctionMode):
    """Reports every :class:`AttentionCall` made on this thread while it is entered.

    ``starts_graph`` decides whether a layer without gradient becomes the first of a graph. ``record_products`` also
    keeps query, key and A V of unfused layers, which only a check needs.
    """

    def __init__(
        self,
        report: Callable[[AttentionCall], None],
        report_unknown: Callable[[str], None],
        math_kernel: bool = False,
        starts_graph: Callable[[Tensor], bool] | None = None,
        record_products: bool = False,
    ) -> None:
        super().__init__()
        self._report = report
        self._report_unknown = report_unknown
        self._math_kernel = math_kernel
        self._starts_graph = starts_graph
        self._record_products = record_products
        self._followed: dict[int, _Followed] = {}
        self._unmet: dict[int, str] = {}  # probabilities that have met no values so far, in words
        self._met: set[int] = set()

    def forget(self) -> list[str]:
        """Stops following and returns descriptions of the softmaxes that met no V."""
        unmet = list(dict.fromkeys(self._unmet.values()))
        self._followed.clear()
        self._unmet.clear()
        self._met.clear()
        return unmet

    @never_traced
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        role = ROLES.get(func) or learn_role(func)
        if role is Role.OTHER and not self._followed:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if role is Role.FUSED:
            return self._fused(args, kwargs)
        if role is Role.MULTI_HEAD:
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if role is Role.SOFTMAX:
            self._softmax(result, *args, **kwargs)
        elif role is Role.UNKNOWN_KERNEL:
            self._report_unknown(kernels.name_of(func))
        else:
            self._follow(kernels.name_of(func), args, kwargs, result)
        return result

    def _fused(self, args: Any, kwargs: Any) -> Tensor:
        if self._math_kernel:
            with math_kernel():
                output: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        else:
            output = F.scaled_dot_product_attention(*args, **kwargs)
        query, key, value, mask, dropout, causal, scale = kernels.sdpa_arguments(*args, **kwargs)
        self._start_graph(output)
        recorded = RecordedTensors(
            query, key, value, output, None, mask, causal, scale, _inside.heads if query.ndim == 3 else None
        )
        self._report(AttentionCall(recorded, *kernels.laid_out(value), dropout, True, _inside.refusal))
        return output

    def _start_graph(self, tensor: Tensor) -> None:
        if self._starts_graph is not None and not tensor.requires_grad and self._starts_graph(tensor):
            tensor.requires_grad_()

    def _multi_head(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """Runs the function's own body under the mode, because the function dispatches once and hides its kernels.

        The weights that it returns are not on the path to its output, so the output's gradient does not reach them.
        """
        query, key, heads = (kernels.argument(func, name, args, kwargs) for name in ("query", "key", "num_heads"))
        before = _inside.heads, _inside.refusal
        _inside.heads = heads
        _inside.refusal = None if kernels.is_same(query, key) else "cross-attention: the keys are of other tokens"
        try:
            with self:
                return kernels.body(func)(*args, **kwargs)
        finally:
            _inside.heads, _inside.refusal = before

    def _followed_as(self, tensor: Any) -> _Followed | None:
        known = self._followed.get(id(tensor))
        return known if known is not None and known.alias() is tensor else None

    def _softmax(self, probability: Tensor, input: Tensor, dim: int | None = None, *_: Any, **kwargs: Any) -> None:
        dim, shape = kwargs.get("dim", dim), tuple(probability.shape)
        scores = self._followed_as(input)
        if len(shape) < (2 if scores is not None else 3):  # probabilities of classes
            return
        refusal = None
        if scores is None:  # a gate over channels or classes, or the weights of linear attention
            refusal = f"linear attention or a gate: a softmax over {shape} of no product of queries and keys"
        elif len(shape) < 3:
            refusal = f"attention between images, not their tokens: a softmax over {shape}"
        elif dim not in (-1, len(shape) - 1):
            refusal = f"no attention over keys: a softmax over axis {dim} of {shape}, not the last"
        else:
            self._start_graph(probability)
        self._unmet[id(probability)] = refusal or f"a softmax over {shape} that met no values"
        factors, sources = scores.factors if scores else None, frozenset([id(probability)])
        self._followed[id(probability)] = _Followed(
            weakref.ref(probability), factors, probability, sources, refusal=refusal
        )

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        operands = [
            a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)) if isinstance(a, Tensor)
        ]
        operands += [a for a in kwargs.values() if isinstance(a, Tensor)]
        followed = [self._followed_as(operand) for operand in operands]
        if name in kernels.PRODUCT_NAMES:
            equation = args[0] if name == "einsum" else None
            probable = [t is not None and t.probability is not None for t in followed]
            if not any(probable):
                self._start_scores(equation, operands, result)
                return
            if sum(probable) > 1 or len(followed) != 2:
                return
            if not isinstance(operands[probable.index(False)], nn.Parameter):
                self._met_values(equation, operands, followed, result)
                return
            # else a matrix of weights mixes the heads: not values
        found = [t for t in followed if t is not None]
        if not found or not isinstance(result, Tensor) or not result.is_floating_point():
            return
        # If there are several, follow the likeliest attention: ConViT adds a softmax over positions.
        known = min(found, key=lambda t: (t.probability is None, t.refusal is not None))
        if known.probability is None:
            self._followed[id(result)] = replace(known, alias=weakref.ref(result))
            return
        alias = known.alias()
        assert alias is not None
        same_rows = name in kernels.SAME_ROWS_NAMES and result.shape[-1:] == alias.shape[-1:]
        turned = not same_rows and kernels.is_transposed(result, alias)
        dropped = kernels.dropout_of(args, kwargs) if "dropout" in name else 0.0
        overwritten = dropped > 0 and any(result is operand for operand in operands)
        same = name in kernels.SAME_MAP_NAMES and result.shape == alias.shape and not overwritten
        self._followed[id(result)] = replace(
            known,
            alias=weakref.ref(result),
            sources=frozenset().union(*(t.sources for t in found)),
            transposed=known.transposed != turned,
            reshaped=known.reshaped or same_rows,
            mixed=known.mixed or not (same or same_rows or turned),
            dropout=max(known.dropout, dropped),
        )

    def _start_scores(self, equation: str | None, operands: list[Tensor], result: Any) -> None:
        if isinstance(result, Tensor):
            factors = kernels.score_factors(equation, operands) if self._record_products else None
            self._followed[id(result)] = _Followed(weakref.ref(result), factors)

    def _met_values(self, equation: str | None, operands: list[Tensor], followed: list[Any], output: Tensor) -> None:
        """Reports the operand that meets V as the attention, before dropout if nothing else changed it.

        Its first product is with V. A later product (a refinement of class maps) is not another layer.
        """
        position = next(i for i, t in enumerate(followed) if t is not None and t.probability is not None)
        known: _Followed = followed[position]
        if known.sources <= self._met:
            return
        self._met |= known.sources
        for source in known.sources:
            self._unmet.pop(source, None)
        alias, probability = known.alias(), known.probability
        assert alias is not None and probability is not None
        found = kernels.value_product(equation, position, known.transposed, operands, output)
        changed = known.mixed or known.reshaped
        attention = alias.transpose(-2, -1) if changed and known.transposed else alias if changed else probability
        if changed and known.transposed:
            found = replace(found, refusal="a mixed map that is transposed before it meets the values")
        # The product, and operands that may be views of larger tensors, are kept only for checks.
        kept: dict[str, Any] = {}
        if self._record_products:
            query, key = known.factors or (None, None)
            kept = {"query": query, "key": key, "value": found.value, "output": found.output}
        recorded = RecordedTensors(map=attention, heads=_inside.heads, **kept)
        stochastic = not known.mixed and not (known.reshaped and known.dropout > 0)
        refusal = _inside.refusal or known.refusal or found.refusal
        self._report(AttentionCall(recorded, *kernels.laid_out(found.value), known.dropout, stochastic, refusal))
