"""The JSON of a run: enough to repeat it, and every figure behind the table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from acr_reg import __version__

_PACKAGES = ("torch", "numpy", "einops", "timm", "scikit-image", "scikit-learn", "matplotlib", "pillow")


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` may hold dataclasses; what the run was called with and ran on is added."""
    run = {"command": sys.argv[1:], "versions": versions(), "machine": machine()}
    path.write_text(json.dumps(run | content, indent=1, default=_plain, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"found a {type(value).__name__} in the run's record; expected plain values or dataclasses")
