"""Follows the scores of attention that no fused kernel computes to the map that meets V.

From the product of queries and keys through bias and mask to the softmax, and from there as probabilities through
dropout, casts and mixing to the product with V.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors
from acr_reg.attention.observed import Observed
from acr_reg.capture import kernels
from acr_reg.placement.observation import observe_views
from acr_reg.placement.sources import Sources


@dataclass(frozen=True, eq=False)
class Listener:
    """Hears of every attention call.

    ``running`` lists the running modules, outermost first; ``report`` gets a call with those that hold all of it.
    ``report_unknown`` gets the name of a kernel that leaves nothing to record. ``starts_graph`` decides whether a layer
    without gradient becomes the first of a graph.
    """

    report: Callable[[AttentionCall, Sequence[Any]], None]
    running: Callable[[], Sequence[Any] | None]
    report_unknown: Callable[[str], None]
    starts_graph: Callable[[Tensor], bool] | None = None

    def is_refused(self, kernel: str, *tensors: Any) -> bool:
        """Whether a kernel ran on tensors that cannot be recorded, which is then reported."""
        why = kernels.unrecordable(*tensors)
        if why is not None:
            self.report_unknown(f"{kernel} {why}")
        return why is not None

    def start_graph(self, tensor: Tensor) -> None:
        if self.starts_graph is not None and not tensor.requires_grad and self.starts_graph(tensor):
            tensor.requires_grad_()


class _MultiHead(threading.local):
    """What nn.MultiheadAttention knows about its products. Shared: only the innermost mode sees its call."""

    heads: int | None = None
    cross: bool = False  # query and key are two tensors

    def leave(self) -> None:
        """Forgets a call that an interruption ended."""
        self.heads, self.cross = None, False


inside_multi_head = _MultiHead()


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
    running: tuple[int, ...] = ()  # numbers of the modules that were running at the product of queries and keys


class ScoreFollower:
    """Follows all scores of one thread. ``record_products`` also keeps query, key and A V. ``sources`` follows the
    tokens of a first run."""

    def __init__(self, listener: Listener, record_products: bool = False, sources: Sources | None = None) -> None:
        self._listener = listener
        self._record_products = record_products
        self._sources = sources
        self.followed: dict[int, _Followed] = {}
        self._unmet: dict[int, str] = {}  # probabilities that have met no values so far, in words
        self._met: set[int] = set()

    def forget(self) -> list[str]:
        """Stops following, and returns descriptions of the softmaxes that met no V."""
        unmet = list(dict.fromkeys(self._unmet.values()))
        self.followed.clear()
        self._unmet.clear()
        self._met.clear()
        return unmet

    def _followed_as(self, tensor: Any) -> _Followed | None:
        known = self.followed.get(id(tensor))
        return known if known is not None and known.alias() is tensor else None

    def softmax(self, probability: Tensor, input: Tensor, dim: int | None = None, *_: Any, **kwargs: Any) -> None:
        """Follows a softmax with its arguments. Attention is one over the keys of scores; others meet no values."""
        scores = self._followed_as(input)
        if why := kernels.unrecordable(probability):
            if scores is not None:
                self._listener.report_unknown(f"softmax {why}")
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
            self._listener.start_graph(probability)
        self._unmet[id(probability)] = refusal or f"a softmax over {shape} that met no values"
        met = _Followed(weakref.ref(probability)) if scores is None else scores
        self.followed[id(probability)] = replace(
            met,
            alias=weakref.ref(probability),
            probability=probability,
            sources=frozenset([id(probability)]),
            refusal=refusal,
        )

    def follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Follows any other function, by name: what it made of scores or probabilities, or of queries and keys."""
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
            mixes = mixes or any(
                t is not None and of_keys and kernels.keeps_keys(equation, position, t.transposed)
                for position, (t, of_keys) in enumerate(zip(followed, probable, strict=True))
            )
            if not mixes and not any(probable):
                self._start_scores(equation, operands, result)
            elif (
                not mixes
                and sum(probable) == 1
                and len(followed) == 2
                and not self._listener.is_refused(name, *operands)
            ):
                self._met_values(equation, operands, followed, result)
            if not mixes:
                return
        found = [t for t in followed if t is not None]
        if not found or not isinstance(result, Tensor) or not result.is_floating_point():
            return
        # If there are several, follow the likeliest attention: ConViT adds a softmax over positions.
        known = min(found, key=lambda t: (t.probability is None, t.refusal is not None))
        if known.probability is None:
            self.followed[id(result)] = replace(known, alias=weakref.ref(result))
            return
        alias = known.alias()
        assert alias is not None
        same_rows = name in kernels.SAME_ROWS_NAMES and result.shape[-1:] == alias.shape[-1:]
        turned = not same_rows and kernels.is_transposed(result, alias)
        dropped = kernels.dropout_of(args, kwargs) if "dropout" in name else 0.0
        overwritten = dropped > 0 and any(result is operand for operand in operands)
        same = name in kernels.SAME_MAP_NAMES and result.shape == alias.shape and not overwritten
        self.followed[id(result)] = replace(
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
        self.followed[id(result)] = _Followed(
            weakref.ref(result),
            kernels.score_factors(equation, operands) if self._record_products else None,
            observed=observe_views(self._sources, operands[-2:], partial(kernels.score_views, equation)),
            running=tuple(entry.number for entry in self._listener.running() or ()),
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
        recorded = RecordedTensors(map=attention, heads=inside_multi_head.heads, **kept)
        call = AttentionCall(
            recorded,
            *kernels.laid_out(found.value),
            known.dropout,
            stochastic=not known.mixed and not (known.reshaped and known.dropout > 0),
            refusal=known.refusal or found.refusal,
            cross=inside_multi_head.cross,
            observed=known.observed,
        )
        now = self._listener.running() or ()
        both = [entry for entry, before in zip(now, known.running, strict=False) if entry.number == before]
        self._listener.report(call, both or now)
