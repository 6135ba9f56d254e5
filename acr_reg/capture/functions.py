"""Sees calls of the attention kernels of xformers and flash_attn: Python functions, which no function mode sees.

Whoever calls one of them, and by whatever name, runs its code. This thread's profile function sees that, and nothing of
the package or of its callers is changed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

_MEMORY_EFFICIENT = ("memory_efficient_attention",)
_FLASH = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
_PACKAGES = {
    "xformers.ops": _MEMORY_EFFICIENT,
    "mslk.attention.fmha": _MEMORY_EFFICIENT,  # where xformers has it from since 2026
    "flash_attn": _FLASH,
    "flash_attn.flash_attn_interface": _FLASH,
    "flash_attn.cute": _FLASH,  # version 4
    "flash_attn_interface": _FLASH,  # version 3
    "transformers.modeling_flash_attention_utils": ("_flash_fn", "_flash_varlen_fn"),  # from whichever package
}

Returned = Callable[[str, Mapping[str, Any], Any], None]


@lru_cache(maxsize=64)  # this runs whenever attention begins
def _code_of(function: Callable[..., Any]) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _kernels() -> dict[CodeType, str]:
    """The name of each kernel that was imported, by its code."""
    found: dict[CodeType, str] = {}
    for package, names in _PACKAGES.items():
        if (module := sys.modules.get(package)) is None:
            continue
        for name in names:
            function = vars(module).get(name)
            code = None if function is None else _code_of(function)
            if code is not None:
                found.setdefault(code, getattr(function, "__name__", name))
    return found


class FunctionWatch:
    """Watches the kernels that this thread calls between :meth:`start` and :meth:`stop`, once."""

    def __init__(self) -> None:
        self._returned: Returned | None = None
        self._kernels: dict[CodeType, str] = {}
        self._before: Callable[..., Any] | None = None  # another profile function of this thread
        self.inside: FrameType | None = None  # the kernel that is running
        self._arguments: dict[str, Any] = {}

    def start(self, returned: Returned) -> None:
        """Tells ``returned`` the name, the arguments by name, and the result of every kernel from now on.

        Does nothing if none was imported, or under a profiler in C such as cProfile before Python 3.12, which could
        not go on beside this.
        """
        self._returned, self._kernels = returned, _kernels()
        before = sys.getprofile()
        if self._kernels and (before is None or callable(before)):
            self._before = before
            sys.setprofile(self)

    def stop(self) -> None:
        self._returned = self.inside = None  # whoever started it may hold this too
        if sys.getprofile() is self:
            before = self._before
            while isinstance(before, FunctionWatch) and before._returned is None:
                before = before._before
            sys.setprofile(before)

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if self._before is not None:
            self._before(frame, event, result)
        if self._returned is None:
            return
        if event == "call":
            if self.inside is None and frame.f_code in self._kernels:
                self.inside, self._arguments = frame, dict(frame.f_locals)
        elif event == "return" and frame is self.inside:
            arguments, self.inside, self._arguments = self._arguments, None, {}
            if result is not None:  # else it raised
                self._returned(self._kernels[frame.f_code], arguments, result)
