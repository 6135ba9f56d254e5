"""Fresh processes, their peak memory, times taken in turns, and the files of results."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from acr_reg.demo.record import peak_memory, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"

Quartiles = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


# glibc keeps freed blocks of less than 32 MB for later: tens of MB, more or less in each run. Below this threshold it
# returns every tensor at once, and the peak is what the process holds.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run_fresh(command: str, payload: Mapping[str, Any], give_back: bool = False) -> Any:
    """What ``python -m benchmarks.cost COMMAND --child payload`` prints as JSON on its last line.

    ``give_back`` sets GIVE_BACK (Linux)."""
    call = [sys.executable, "-m", "benchmarks.cost", command, "--child", json.dumps(payload)]
    environment = {**os.environ, **(GIVE_BACK if give_back else {})}
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def parse(
    parser: ArgumentParser, command: str, child: Callable[[Any], Any] | None, arguments: Sequence[str] | None = None
) -> Namespace | None:
    """The options of a benchmark; None in a process of :func:`run_fresh`, once the answer of ``child`` is printed. A
    benchmark without a ``child`` starts no such process."""
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}/{command}.json")
    if child is None:
        return parser.parse_args(arguments)
    parser.add_argument("--child", help=SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child is None:
        return args
    print(json.dumps(child(json.loads(args.child))))
    return None


def peak_megabytes() -> float:
    """The peak of this process; NaN if the system has no counter."""
    peak = peak_memory()
    return math.nan if peak is None else peak / 2**20


def available_megabytes() -> float:
    memory = Path("/proc/meminfo")
    if not memory.exists():
        return float("inf")
    line = next(each for each in memory.read_text().splitlines() if each.startswith("MemAvailable"))
    return int(line.split()[1]) / 1024


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of process CPU time of each function in each round. Every round times all functions and begins with
    another one, so that the load of the machine affects all alike."""
    names = list(functions)
    spent: dict[str, list[float]] = {name: [] for name in names}
    if warm:
        for function in functions.values():
            function()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.process_time()
            functions[name]()
            spent[name].append(time.process_time() - begin)
    return spent


def quartiles(values: Sequence[float]) -> Quartiles:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> dict[str, Any]:
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    return {"torch": torch.__version__, "machine": platform.machine(), "cpu": model, "threads": torch.get_num_threads()}


def merge(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], **about: Any) -> list[dict[str, Any]]:
    """Add rows to those in the file, in place of those with the same keys. Returns all rows."""
    old = json.loads(path.read_text())["results"] if path.exists() else []
    by_key = {tuple(row[k] for k in keys): dict(row) for row in [*old, *rows]}
    results = [by_key[key] for key in sorted(by_key, key=str)]
    write_json(path, {**machine(), **about, "results": results})
    return results
