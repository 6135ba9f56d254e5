"""Sees every function that torch calls while a model runs, and reports each attention call.

It records fused kernels itself and hands scores to a :class:`~acr_reg.capture.scores.ScoreFollower`. It computes
nothing twice, replaces nothing and stores nothing on modules.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from acr_reg._torch_private import (
    entered,
    flex_attention_operator,
    function_modes,
    is_compiling,
    keep_modes,
    math_kernel,
    never_compiled,
    never_traced,
)
from acr_reg.attention.call import AttentionCall
from acr_reg.attention.layer import RecordedTensors
from acr_reg.capture import kernels
from acr_reg.capture.functions import FunctionWatch
from acr_reg.capture.kernels import ROLES, Role, learn_role
from acr_reg.capture.scores import Listener, ScoreFollower, inside_multi_head
from acr_reg.placement.observation import observe
from acr_reg.placement.sources import Sources


class AttentionMode(TorchFunctionMode):
    """Reports every :class:`AttentionCall` made on this thread while it is entered.

    ``math_kernel`` runs fused attention by the kernel that can be differentiated twice. ``record_products`` also keeps
    query, key and A V of unfused layers, which only a check needs. ``sources`` follows the tokens of a first run.

    ``current`` has the mode that a capture has entered on each thread. An interruption may leave others on the stack:
    they only hand calls on.
    """

    def __init__(
        self,
        listener: Listener,
        current: dict[int, AttentionMode],
        math_kernel: bool = False,
        record_products: bool = False,
        sources: Sources | None = None,
    ) -> None:
        super().__init__()
        self._listener = listener
        self._current, self._thread = current, threading.get_ident()
        self._math_kernel = math_kernel
        self.sources = sources
        self._functions = FunctionWatch()
        self._scores = ScoreFollower(listener, record_products, sources)

    @property
    def is_current(self) -> bool:
        return self._current.get(self._thread) is self

    def watch_functions(self) -> None:
        """Also reports kernels that no mode sees, until :meth:`forget`. torch must be able to trace ``__enter__``."""
        self._functions.start(self._external)

    def forget(self) -> list[str]:
        """Stops watching and following, and returns descriptions of the softmaxes that met no V."""
        self._functions.stop()
        return self._scores.forget()

    @never_compiled
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is flex_attention_operator:  # compiles itself under this mode, which torch must be able to trace here
            if not is_compiling():
                self._listener.report_unknown("flex_attention")
            return func(*args, **(kwargs or {}))
        return self._watch(func, args, kwargs)

    @never_traced
    def _watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        role = ROLES.get(func) or learn_role(func)
        nothing_known = role is Role.OTHER and not self._scores.followed and self.sources is None
        if nothing_known or self._functions.inside is not None or not self.is_current:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if role is Role.FUSED:
            return self._fused(args, kwargs)
        if role is Role.MULTI_HEAD:
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if self.sources is not None:
            self.sources.follow(func, args, kwargs, result)
        if role is Role.SOFTMAX:
            self._scores.softmax(result, *args, **kwargs)
        elif role is Role.UNKNOWN_KERNEL:
            self._listener.report_unknown(kernels.name_of(func))
        else:
            self._scores.follow(kernels.name_of(func), args, kwargs, result)
        return result

    def _fused(self, args: Any, kwargs: Any) -> Tensor:
        if self._math_kernel:
            with math_kernel():
                output: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        else:
            output = F.scaled_dot_product_attention(*args, **kwargs)
        query, key, value, mask, dropout, causal, scale = kernels.sdpa_arguments(*args, **kwargs)
        if self._listener.is_refused("scaled_dot_product_attention", query, key, value):
            return output
        if self.sources is not None:
            self.sources.follow(F.scaled_dot_product_attention, (query, key, value), {}, output)
        self._listener.start_graph(output)
        recorded = RecordedTensors(
            query, key, value, output, None, mask, causal, scale, inside_multi_head.heads if query.ndim == 3 else None
        )
        call = AttentionCall(
            recorded,
            *kernels.laid_out(value),
            dropout,
            cross=inside_multi_head.cross,
            observed=observe(self.sources, query, key),
        )
        self._listener.report(call, self._listener.running() or ())
        return output

    def _external(self, kernel: str, arguments: Mapping[str, Any], result: Any) -> None:
        """Reports a kernel of xformers or flash_attn. It has a result and no way to its inside."""
        if not self.is_current:
            return
        output = result[0] if isinstance(result, tuple) else result
        if self._math_kernel:
            self._listener.report_unknown(f"{kernel}, which has no second derivative,")
            return
        try:
            with entered(self):  # so that the views of query, key and value are followed
                call = kernels.external_call(kernel, arguments, output)
        except kernels.Unrecordable as error:
            self._listener.report_unknown(f"{kernel} {error}")
            return
        query, key = call.recorded.query, call.recorded.key
        if self.sources is not None and query is not None and key is not None:
            call.observed = observe(self.sources, query, key)
            with entered(self):
                as_output = query.transpose(1, 2) if query.ndim == output.ndim == 4 else query  # (B, N, H, d)
            self.sources.follow(F.scaled_dot_product_attention, (as_output, key), {}, output)
        self._listener.start_graph(output)
        self._listener.report(call, self._listener.running() or ())

    def _multi_head(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """Runs the function's own body under the mode, because the function dispatches once and hides its kernels.

        The weights that it returns are not on the path to its output, so the output's gradient does not reach them.
        """
        query, key, heads = (kernels.argument(func, name, args, kwargs) for name in ("query", "key", "num_heads"))
        if self._listener.is_refused(kernels.name_of(func), query, key):
            return func(*args, **kwargs)
        before = inside_multi_head.heads, inside_multi_head.cross
        inside_multi_head.heads, inside_multi_head.cross = heads, not kernels.is_same(query, key)
        try:
            with entered(self):
                return kernels.body(func)(*args, **kwargs)
        finally:
            inside_multi_head.heads, inside_multi_head.cross = before


def clear_modes() -> None:
    """Removes from this thread's stack the modes that an interruption left there."""
    modes, kept, watches = function_modes(), list[bool](), False
    for place, mode in enumerate(modes):
        current = isinstance(mode, AttentionMode) and mode.is_current
        watches = watches or current
        kept.append(not isinstance(mode, AttentionMode) or (current and mode not in modes[:place]))
    if not all(kept):
        keep_modes(modes, kept)
    if not watches:
        inside_multi_head.leave()
