"""Follows the scores of attention to the map that meets V, and reports every attention call of a model.

While the mode is entered, it sees F.scaled_dot_product_attention with its factors. Elsewhere it follows scores from the
product of queries and keys through bias and mask to the softmax, and probabilities through dropout, casts and mixing to
the product with V. It computes nothing twice, replaces nothing and stores nothing on modules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg._torch_private import flex_attention_operator, is_compiling, math_kernel, never_traced
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors
from acr_reg.attention.observed import Observed
from acr_reg.capture import kernels
from acr_reg.capture.functions import FunctionWatch
from acr_reg.capture.kernels import ROLES, Role, learn_role
from acr_reg.placement.observation import observe, observe_views
from acr_reg.placement.sources import Sources


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
    observed: Observed | None = None
    running: tuple[Any, ...] = ()  # the modules that were running at the product of queries and keys


class _MultiHead(threading.local):
    """What nn.MultiheadAttention knows about its products. Shared: only the innermost mode sees its call."""

    heads: int | None = None
    cross: bool = False  # query and key are two tensors


_inside = _MultiHead()


class AttentionMode(TorchFunctionMode):
    """Reports every :class:`AttentionCall` made on this thread while it is entered.

    It passes on which of the modules that ``running`` lists, outermost first, hold the whole call. ``starts_graph``
    decides whether a layer without gradient becomes the first of a graph. ``record_products`` also keeps query, key and
    A V of unfused layers, which only a check needs. ``sources`` follows the tokens of a first run.
    """

    def __init__(
        self,
        report: Callable[[AttentionCall, Sequence[Any]], None],
        running: Callable[[], Sequence[Any] | None],
        report_unknown: Callable[[str], None],
        math_kernel: bool = False,
        starts_graph: Callable[[Tensor], bool] | None = None,
        record_products: bool = False,
        sources: Sources | None = None,
    ) -> None:
        super().__init__()
        self._report = report
        self._running = running
        self._sources = sources
        self._report_unknown = report_unknown
        self._math_kernel = math_kernel
        self._starts_graph = starts_graph
        self._record_products = record_products
        self._functions = FunctionWatch()
        self._followed: dict[int, _Followed] = {}
        self._unmet: dict[int, str] = {}  # probabilities that have met no values so far, in words
        self._met: set[int] = set()
        self._ended = False

    def watch_functions(self) -> None:
        """Also reports kernels that no mode sees, until :meth:`forget`. torch must be able to trace ``__enter__``."""
        self._functions.start(self._external)

    def forget(self) -> list[str]:
        """Stops watching and following, and returns descriptions of the softmaxes that met no V."""
        self._functions.stop()
        unmet = list(dict.fromkeys(self._unmet.values()))
        self._followed.clear()
        self._unmet.clear()
        self._met.clear()
        return unmet

    def end(self) -> None:
        """From now on only hands calls on: no thread can take a mode off another's stack."""
        self._ended = True
        self.forget()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is flex_attention_operator:  # compiles itself under this mode, which torch must be able to trace here
            if not is_compiling():
                self._report_unknown("flex_attention")
            return func(*args, **(kwargs or {}))
        return self._watch(func, args, kwargs)

    @never_traced
    def _watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._functions.inside:
            return func(*args, **(kwargs or {}))
        role = ROLES.get(func) or learn_role(func)
        if self._ended or (role is Role.OTHER and not self._followed and self._sources is None):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if role is Role.FUSED:
            return self._fused(args, kwargs)
        if role is Role.MULTI_HEAD:
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._sources is not None:
            self._sources.follow(func, args, kwargs, result)
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
        if self._refuses("scaled_dot_product_attention", query, key, value):
            return output
        if self._sources is not None:
            self._sources.follow(F.scaled_dot_product_attention, (query, key, value), {}, output)
        self._start_graph(output)
        recorded = RecordedTensors(
            query, key, value, output, None, mask, causal, scale, _inside.heads if query.ndim == 3 else None
        )
        call = AttentionCall(
            recorded,
            *kernels.laid_out(value),
            dropout,
            cross=_inside.cross,
            observed=observe(self._sources, query, key),
        )
        self._report(call, self._running() or ())
        return output

    def _external(self, kernel: str, arguments: Mapping[str, Any], result: Any) -> None:
        """Reports a kernel of xformers or flash_attn. It has a result and no way to its inside."""
        output = result[0] if isinstance(result, tuple) else result
        if self._math_kernel:
            self._report_unknown(f"{kernel}, which has no second derivative,")
            return
        try:
            with self:  # so that the views of query, key and value are followed
                call = kernels.external_call(kernel, arguments, output)
        except kernels.Unrecordable as error:
            self._report_unknown(f"{kernel} {error}")
            return
        query, key = call.recorded.query, call.recorded.key
        if self._sources is not None and query is not None and key is not None:
            call.observed = observe(self._sources, query, key)
            with self:
                as_output = query.transpose(1, 2) if query.ndim == output.ndim == 4 else query  # (B, N, H, d)
            self._sources.follow(F.scaled_dot_product_attention, (as_output, key), {}, output)
        self._start_graph(output)
        self._report(call, self._running() or ())

    def _refuses(self, kernel: str, *tensors: Any) -> bool:
        """Whether a kernel ran on tensors that cannot be recorded, which is then reported."""
        why = kernels.unrecordable(*tensors)
        if why is not None:
            self._report_unknown(f"{kernel} {why}")
        return why is not None

    def _start_graph(self, tensor: Tensor) -> None:
        if self._starts_graph is not None and not tensor.requires_grad and self._starts_graph(tensor):
            tensor.requires_grad_()

    def _multi_head(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """Runs the function's own body under the mode, because the function dispatches once and hides its kernels.

        The weights that it returns are not on the path to its output, so the output's gradient does not reach them.
        """
        query, key, heads = (kernels.argument(func, name, args, kwargs) for name in ("query", "key", "num_heads"))
        if self._refuses(kernels.name_of(func), query, key):
            return func(*args, **kwargs)
        before = _inside.heads, _inside.cross
        _inside.heads, _inside.cross = heads, not kernels.is_same(query, key)
        try:
            with self:
                return kernels.body(func)(*args, **kwargs)
        finally:
            _inside.heads, _inside.cross = before

    def _followed_as(self, tensor: Any) -> _Followed | None:
        known = self._followed.get(id(tensor))
        return known if known is not None and known.alias() is tensor else None

    def _softmax(self, probability: Tensor, input: Tensor, dim: int | None = None, *_: Any, **kwargs: Any) -> None:
        scores = self._followed_as(input)
        if why := kernels.unrecordable(probability):
            if scores is not None:
                self._report_unknown(f"softmax {why}")
            return
        dim, shape = kwargs.get("dim", dim), tuple(probability.shape)
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
        met = _Followed(weakref.ref(probability)) if scores is None else scores
        self._followed[id(probability)] = replace(
            met,
            alias=weakref.ref(probability),
            probability=probability,
            sources=frozenset([id(probability)]),
            refusal=refusal,
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
            # A product with a matrix of weights mixes the heads of scores or maps: it meets no keys or values.
            mixes = any(followed) and any(isinstance(operand, nn.Parameter) for operand in operands)
            if not mixes and not any(probable):
                self._start_scores(equation, operands, result)
            elif not mixes and sum(probable) == 1 and len(followed) == 2 and not self._refuses(name, *operands):
                self._met_values(equation, operands, followed, result)
            if not mixes:
                return
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
        if not isinstance(result, Tensor):
            return
        self._followed[id(result)] = _Followed(
            weakref.ref(result),
            kernels.score_factors(equation, operands) if self._record_products else None,
            observed=observe_views(self._sources, operands[-2:], partial(kernels.score_factors, equation)),
            running=tuple(self._running() or ()),
        )

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
        call = AttentionCall(
            recorded,
            *kernels.laid_out(found.value),
            known.dropout,
            stochastic=not known.mixed and not (known.reshaped and known.dropout > 0),
            refusal=known.refusal or found.refusal,
            cross=_inside.cross,
            observed=known.observed,
        )
        now = self._running() or ()
        both = [entry for entry, before in zip(now, known.running, strict=False) if entry is before]
        self._report(call, both or now)
