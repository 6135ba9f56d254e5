"""The record of a run: what it ran on, what it cost, and the JSON file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from acr_reg import __version__
from acr_reg.integrations.formats.write import replacing

_PACKAGES = ("torch", "numpy", "einops", "timm", "scikit-image", "scikit-learn", "matplotlib", "pillow")


def run_details() -> dict[str, Any]:
    """What is needed to repeat this process: its arguments, the installed versions, the machine."""
    return {"command": sys.argv[1:], "versions": versions(), "machine": machine()}


def versions() -> dict[str, str]:
    installed = {name: found for name in _PACKAGES if (found := _version(name))}
    return {"acr_reg": __version__, "python": platform.python_version()} | installed


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: Any, *, lines: bool = False) -> None:
    """Write plain values and dataclasses. NaN and infinity raise ValueError, because JSON cannot hold them.

    ``lines``: one line for each entry of a mapping, long lists included, which keeps thousands of figures readable.
    """
    if lines:
        entries = [f"{json.dumps(name)}: {_json(value)}" for name, value in content.items()]
        text = "{\n" + ",\n".join(entries) + "\n}\n"
    else:
        text = _json(content, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=_plain, allow_nan=False)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"A record cannot hold a {type(value).__name__}. Use plain values or dataclasses.")


class Meter:
    """Measures its `with` block: `seconds`, `cpu_seconds` (all threads) and `peak_memory` in bytes.

    On Linux `peak_memory` is the peak of the block, because the kernel can reset its counter. Elsewhere it is the peak
    since the process began, or None if the system has no counter.
    """

    seconds = 0.0
    cpu_seconds = 0.0
    peak_memory: int | None = None

    def __enter__(self) -> Meter:
        with suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_seconds = time.process_time() - self._cpu
        self.peak_memory = peak_memory()


def peak_memory() -> int | None:
    """The peak resident memory of this process in bytes; None if the system has no counter.

    /proc's counter begins at 0 with the program. getrusage's begins at the size of the process that launched it, so it
    is used only where there is no /proc.
    """
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
