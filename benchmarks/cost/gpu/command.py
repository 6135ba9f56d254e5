"""Training steps and class maps on a GPU: time by CUDA events, the allocator's peak, and the error beside them.

    python -m benchmarks.cost gpu                       # into benchmarks/cost/results/gpu.json; at most 7 minutes
    python -m benchmarks.cost gpu --out results.json    # into another file
    python -m benchmarks.cost gpu --stand-in            # the same code on the CPU, with tiny models; prints only
    python -m benchmarks.cost page --write              # then: the tables of docs/explanation/gpu_cost.md

Each row is written once it is measured. A second call measures the rows that are missing, so a call that ends early
loses nothing; ``--again`` empties the file first. A case that runs out of memory or fails is recorded as such. The
command returns 1 if any row is wrong: further from the published procedure in float32 than its precision explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.gpu.cases import KEYS, Case, on_gpu, stand_in
from benchmarks.cost.gpu.measure import Limits, device_memory, measure
from benchmarks.cost.process import RESULTS, merge

FILE = RESULTS / "gpu.json"
STAND_IN = Limits("cpu", rounds=1, most=4)


class CannotMeasure(RuntimeError):
    """There is no CUDA device, or the file holds results of another."""


def run(
    cases: Sequence[Case], limits: Limits, out: Path | None, seconds: float, again: bool = False
) -> Iterator[dict[str, Any]]:
    """Measures the cases that ``out`` does not hold yet, until ``seconds`` are over, and yields their rows."""
    end = time.monotonic() + seconds
    device = torch.cuda.get_device_name() if limits.device == "cuda" else "CPU"
    about = {"device": device, "torch": torch.__version__, "gibibytes": limits.gibibytes}
    if out is not None and again:
        out.unlink(missing_ok=True)
    known = {} if out is None else _known(out, about)
    for case in cases:
        key = tuple(case.key.values())
        if key in known:
            continue
        if time.monotonic() > end:
            return
        row = {**case.key, **asdict(measure(case, limits, _published(case, known)))}
        known[key] = row
        if out is not None:
            merge(out, [row], KEYS, **about)
        yield row


def on_this_gpu() -> Limits:
    if not torch.cuda.is_available():
        raise CannotMeasure(
            "There is no CUDA device. Use a machine with a GPU, or measure on the CPU: python -m benchmarks.cost step, "
            "and cam."
        )
    return Limits(gibibytes=min(Limits.gibibytes, device_memory() / 2**30))


def _known(out: Path, about: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    if not out.exists():
        return {}
    record = json.loads(out.read_text(encoding="utf-8"))
    found = {name: record[name] for name in about}
    if found != about:
        raise CannotMeasure(
            f"{out} holds results of {found}, and this is {about}. Pass another file as --out, or --again."
        )
    return {tuple(row[name] for name in KEYS): row for row in record["results"]}


def _published(case: Case, known: dict[tuple[Any, ...], dict[str, Any]]) -> tuple[float, ...] | None:
    row = known.get(tuple(replace(case, variant="published").key.values()))
    return None if row is None else row["errors"]


def show(row: dict[str, Any]) -> str:
    present = "" if row["present"] is None else f", {row['present']} classes"
    setting = f"{row['model']} {row['size']} px, batch {row['batch']}{present}, {row['precision']}"
    parts = [f"{row['what']:13} {setting:47} {row['variant']:16}"]
    if row["milliseconds"] is not None:
        parts.append(f"{row['milliseconds'][1]:9.2f} ms")
    if row["peak_mb"] is not None:
        parts.append(f"{row['peak_mb']:8.0f} MB")
    if row["fits"] is not None:
        parts.append(f"{row['fits']} images fit")
    if row["errors"] is not None:
        parts.append("errors " + ", ".join(f"{error:.0e}" for error in row["errors"]))
    if row["right"] is False:
        parts.append("WRONG")
    if row["note"] is not None:
        parts.append(row["note"])
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost gpu", description="Steps and class maps on a GPU.")
    parser.add_argument("--seconds", type=float, default=420, help="begin no case after this time")
    parser.add_argument("--out", type=Path, help="the file of results, by default benchmarks/cost/results/gpu.json")
    parser.add_argument("--again", action="store_true", help="empty the file first")
    parser.add_argument("--stand-in", action="store_true", help="tiny cases on the CPU; written only with --out")
    args = parser.parse_args(arguments)
    out = args.out if args.out is not None or args.stand_in else FILE
    wrong = measured = 0
    try:
        cases, limits = (stand_in(), STAND_IN) if args.stand_in else (on_gpu(), on_this_gpu())
        for row in run(cases, limits, out, args.seconds, args.again):
            print(show(row), flush=True)
            measured += 1
            wrong += row["right"] is False
    except CannotMeasure as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{measured} of {len(cases)} rows measured in this call, {wrong} of them wrong.")
    return int(wrong > 0)
