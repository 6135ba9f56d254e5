"""What a piece of work costs: wall clock, processor time and peak memory of this process."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class Meter:
    """Measures its `with` block: `seconds`, `cpu_seconds` (all threads) and `peak_memory` in bytes.

    Linux can forget an earlier peak, so that `peak_memory` is the block's own. Elsewhere it is the highest since the
    process began, or None where the system does not say.
    """

    seconds = 0.0
    cpu_seconds = 0.0
    peak_memory: int | None = None

    def __enter__(self) -> Meter:
        _forget_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = time.process_time() - self._cpu
        self.peak_memory = _peak_memory()


def _forget_peak() -> None:
    with suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
