"""One row of the results: time and peak memory of a case, and how far it is from the published procedure in float32."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.cost.cam import map_error
from benchmarks.cost.gpu.cases import CLASS_MAPS, FULL, LARGEST, PROFILE, Case
from benchmarks.cost.models import Setting
from benchmarks.cost.process import Quartiles, quartiles
from benchmarks.cost.variants import (
    GRAD_CAM,
    HOOKS,
    ROWS,
    UNPROPAGATED,
    consistency_of,
    loss_scale,
    make_cam,
    make_step,
)

_T = TypeVar("_T")

# Largest relative errors of the loss, of its gradient (norm) and of class maps that pass: float32 shows other orders of
# summation, half precision its rounding. The published procedure in half precision may be off by more; then so may we.
ALLOWED = {
    "float32": (1e-5, 1e-3, 1e-4),
    "bfloat16": (1e-2, 0.2, 0.05),
    "float16": (2e-3, 0.1, 0.01),
}
AS_PUBLISHED = 1.5  # times the error of the published procedure in the same precision
LISTED = 12  # operations of a profile
COUNTED = {
    "kernel launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "synchronizations": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "copies to the device": ("Memcpy HtoD",),
    "reads of a device tensor": ("aten::_local_scalar_dense", "aten::nonzero"),
}


@dataclass(frozen=True)
class Limits:
    """Where and for how long a case runs. ``gibibytes``: the memory that a largest batch may take."""

    device: str = "cuda"
    seconds: float = 1.0  # of timed rounds
    rounds: int = 20
    gibibytes: float = 24.0
    most: int = 1024  # images of a largest batch


@dataclass(frozen=True)
class Row:
    """What was found for a case. None: not measured. ``errors`` are those of the loss and its gradient, or of the class
    maps; ``right`` says whether they are allowed. ``fits`` is the largest power of two of images that fitted."""

    milliseconds: Quartiles | None = None
    peak_mb: float | None = None
    errors: tuple[float, ...] | None = None
    right: bool | None = None
    fits: int | None = None
    operations: tuple[tuple[str, int, float], ...] | None = None  # name, calls, ms
    counts: Mapping[str, int] | None = None
    note: str | None = None


def measure(case: Case, limits: Limits, published: tuple[float, ...] | None = None) -> Row:
    """The row of a case, whatever happens to it. ``published``: the errors of the published procedure in this setting
    and precision, where they are known."""
    measured = {CLASS_MAPS: _class_maps, LARGEST: _largest, PROFILE: _profile}.get(case.what, _step)
    try:
        row = measured(case, limits)
    except torch.cuda.OutOfMemoryError:
        row = Row(note="out of memory")
    except ImportError as error:
        row = Row(note=f"{error.name} is not installed")
    except Exception as error:  # the other cases still count
        row = Row(right=False, note=f"{type(error).__name__}: {error}"[:300])
    _free(limits.device)
    return row if row.errors is None else replace(row, right=_right(case, row.errors, published))


def _free(device: str) -> None:
    """What no case uses any more; models and their captures hold each other."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _right(case: Case, errors: tuple[float, ...], published: tuple[float, ...] | None) -> bool:
    *step, maps = ALLOWED[case.precision]
    allowed = [maps] if case.what == CLASS_MAPS else step
    if published is not None and case.precision != FULL:
        allowed = [max(own, AS_PUBLISHED * theirs) for own, theirs in zip(allowed, published, strict=True)]
    return all(error <= most for error, most in zip(errors, allowed, strict=True))


def _step(case: Case, limits: Limits) -> Row:
    dtype, rows = getattr(torch, case.precision), ROWS if case.variant == "rows" else None
    model, step = make_step(case.variant, case.setting, limits.device, dtype=dtype)
    errors = note = None
    if case.variant == "plain":
        step()
    else:
        with _exact():
            value, gradient = consistency_of(model, step, case.setting, loss_scale(dtype))
        (expected, its_gradient), note = _consistency(case.setting, limits.device, rows)
        off = (gradient - its_gradient).norm() / its_gradient.norm()
        errors = (_finite(abs(value / expected - 1)), _finite(off.item()))
        del gradient
    return replace(_timed(step, limits), errors=errors, note=note)


@lru_cache(maxsize=2)
def _consistency(setting: Setting, device: str, rows: float | None) -> tuple[tuple[float, Tensor], str | None]:
    """The published value and gradient; those of a share of the rows, which is not published, by the dense maps."""
    return _reference(
        lambda variant: consistency_of(*make_step(variant, setting, device, rows), setting),
        "published" if rows is None else "dense",
        "blockwise",
        device,
    )


def _class_maps(case: Case, limits: Limits) -> Row:
    make = make_cam(case.variant, case.setting, limits.device, getattr(torch, case.precision))
    errors = note = None
    if case.variant in ("forward", GRAD_CAM):
        make()
    else:
        with _exact():
            maps = make()
        expected, note = _published_maps(case.setting, limits.device, case.variant in (UNPROPAGATED, HOOKS))
        errors = (_finite(map_error(maps.float(), expected)),)
    return replace(_timed(make, limits), errors=errors, note=note)


@lru_cache(maxsize=2)
def _published_maps(setting: Setting, device: str, unpropagated: bool) -> tuple[Tensor, str | None]:
    first, second = (HOOKS, UNPROPAGATED) if unpropagated else ("published", "library")
    return _reference(lambda variant: make_cam(variant, setting, device)(), first, second, device)


def _reference(compute: Callable[[str], _T], first: str, second: str, device: str) -> tuple[_T, str | None]:
    """In float32, by the ``first`` variant, or by the ``second`` and a note if there is not enough memory."""
    with _exact():
        with suppress(torch.cuda.OutOfMemoryError):
            return compute(first), None
        _free(device)
        return compute(second), f"compared with {second} in float32"


@contextmanager
def _exact() -> Iterator[None]:
    """Float32 without TF32, which convolutions use by default. Rows in float32 run with torch's defaults."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def _finite(error: float) -> float:
    """JSON holds no NaN and no infinity."""
    return error if math.isfinite(error) else 1e9


def _largest(case: Case, limits: Limits) -> Row:
    with _memory_of(limits):
        row, batch = Row(note="out of memory"), case.setting.batch
        while batch <= limits.most:
            _free(limits.device)
            try:
                row = replace(_step_of(replace(case.setting, batch=batch), case, limits), fits=batch)
            except torch.cuda.OutOfMemoryError:
                break
            batch *= 2
        return row


def device_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def _step_of(setting: Setting, case: Case, limits: Limits) -> Row:
    _, step = make_step(case.variant, setting, limits.device, dtype=getattr(torch, case.precision))
    return _timed(step, replace(limits, rounds=2))


@contextmanager
def _memory_of(limits: Limits) -> Iterator[None]:
    """As much memory as a common card has."""
    if limits.device != "cuda":
        yield
        return
    _free(limits.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limits.gibibytes * 2**30 / device_memory()))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _profile(case: Case, limits: Limits) -> Row:
    _, step = make_step(case.variant, case.setting, limits.device, dtype=getattr(torch, case.precision))
    step()
    row = _timed(step, limits)
    on_gpu, activities = limits.device == "cuda", [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    events = list(profiler.key_averages())
    counts = {name: sum(e.count for e in events if e.key.startswith(prefixes)) for name, prefixes in COUNTED.items()}
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    of_torch = (e for e in events if "::" in e.key)  # the kernels that they launch are listed beside them
    longest = sorted(of_torch, key=lambda e: -getattr(e, spent))[:LISTED]
    operations = tuple((e.key, e.count, getattr(e, spent) / 1000) for e in longest)
    return replace(row, operations=operations, counts=counts)


def _timed(run: Callable[[], Any], limits: Limits) -> Row:
    """Time by CUDA events and the peak of the allocator, after one more call to warm up."""
    on_gpu = limits.device == "cuda"
    run()
    _free(limits.device)  # the models that were compared with
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    while len(spent) < limits.rounds and (not spent or sum(spent) < 1000 * limits.seconds):
        spent.append(_cuda_time(run) if on_gpu else _cpu_time(run))
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return Row(milliseconds=quartiles(spent), peak_mb=peak)


def _cuda_time(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _cpu_time(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return 1000 * (time.process_time() - begin)
