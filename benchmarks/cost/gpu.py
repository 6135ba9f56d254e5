"""The cost cases on a CUDA device: time by CUDA events, memory by the allocator's peak. Not measured yet.

    python -m benchmarks.cost gpu            # ViT-S at 384 and 768 px, batch 1 and 4; class maps of 1, 2 and 5 classes
    python -m benchmarks.cost gpu --write    # also results/gpu.json and the table of docs/explanation/gpu_cost.md

The steps and class maps are those of step.py and cam.py. A case that runs out of memory is reported as such.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acr_reg.demo.record import write_json
from benchmarks.cost.models import HEADS, Setting
from benchmarks.cost.process import RESULTS
from benchmarks.cost.variants import CAMS, STEPS, make_cam, make_step
from benchmarks.marked_page import begin, fill

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "gpu_cost.md"
BEGIN = begin("cost gpu --write")


class NoGpu(RuntimeError):
    """There is no CUDA device."""


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("small",)
    sizes: tuple[int, ...] = (384, 768)
    batches: tuple[int, ...] = (1, 4)
    present: tuple[int, ...] = (1, 2, 5)
    rounds: int = 20
    device: str = "cuda"


@dataclass(frozen=True)
class Result:
    """One variant of a step or of class maps (of ``present`` classes). None means out of memory."""

    what: str
    model: str
    size: int
    batch: int
    present: int | None
    variant: str
    milliseconds: float | None
    peak_mb: float | None


def measure(config: Config) -> list[Result]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NoGpu(
            "There is no CUDA device. Use a machine with a GPU, or measure on the CPU: python -m benchmarks.cost step, "
            "and cam."
        )
    results = []
    for model in config.models:
        for size in config.sizes:
            for batch in config.batches:
                setting = Setting(model, size, batch)
                results += [_one("step", setting, None, variant, config) for variant in STEPS]
            for present in config.present:
                setting = Setting(model, size, 1, present=present)
                results += [_one("class maps", setting, present, variant, config) for variant in CAMS]
    return results


def _one(what: str, setting: Setting, present: int | None, variant: str, config: Config) -> Result:
    about = (what, setting.model, setting.size, setting.batch, present, variant)
    on_gpu = config.device == "cuda"
    try:
        run: Callable[[], object]
        if what == "step":
            _, run = make_step(variant, setting, config.device)
        else:
            run = make_cam(variant, setting, config.device)
        run()  # warms up kernels and the allocator
        run()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        spent = [_cuda_time(run) if on_gpu else _cpu_time(run) for _ in range(config.rounds)]
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    except torch.cuda.OutOfMemoryError:
        spent, peak = None, None
    if on_gpu:
        torch.cuda.empty_cache()
    return Result(*about, None if spent is None else statistics.median(spent), peak)


def _cuda_time(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _cpu_time(run: Callable[[], object]) -> float:
    """Stands in for CUDA events on a CPU."""
    begin = time.process_time()
    run()
    return 1000 * (time.process_time() - begin)


def table(results: Sequence[Result]) -> str:
    lines = ["| what | model | px | batch | classes | variant | ms | peak MB |", "|---|---|---|---|---|---|---|---|"]
    for r in results:
        if r.milliseconds is None:
            cost = "out of memory | "
        else:
            cost = f"{r.milliseconds:.1f} | " + ("" if r.peak_mb is None else f"{r.peak_mb:.0f}")
        present = "" if r.present is None else r.present
        lines.append(f"| {r.what} | {r.model} | {r.size} | {r.batch} | {present} | {r.variant} | {cost} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost gpu", description="The cost cases on a CUDA device.")
    parser.add_argument("--models", nargs="+", choices=HEADS, default=Config.models)
    parser.add_argument("--sizes", nargs="+", type=int, default=Config.sizes)
    parser.add_argument("--batches", nargs="+", type=int, default=Config.batches)
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/cost/results/gpu.json and docs/explanation/gpu_cost.md"
    )
    args = parser.parse_args(arguments)
    config = Config(tuple(args.models), tuple(args.sizes), tuple(args.batches))
    try:
        results = measure(config)
    except NoGpu as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    if args.write:
        device = torch.cuda.get_device_name()
        record = {"torch": torch.__version__, "device": device, "config": config, "results": results}
        write_json(RESULTS / "gpu.json", record)
        fill(PAGE, BEGIN, f"Measured on {device}, torch {torch.__version__}:\n\n{table(results)}")
    return 0
