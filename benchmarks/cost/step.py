"""CPU time and peak memory that the loss adds to a training step of two views, compared with the published procedure.

    python -m benchmarks.cost step                               # ViT-S at 384 px, one image
    python -m benchmarks.cost step --write                       # also into benchmarks/cost/results/step.json
    python -m benchmarks.cost step --models tiny small base --sizes 224 384 512 --batches 1 4 --write

The variants are a step without the loss (plain), with the published procedure, and with the library's loss: dense,
blockwise, and blockwise on a quarter of the rows (rows). All variants are timed in turns in one process, in process CPU
time; "extra" is what a step takes beyond the plain one of the same round. Peak memory is measured in a fresh process
for each variant. The command also prints how far the value and the gradient of the consistency are from the dense ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

import torch

from benchmarks.cost.models import Setting, add_settings, settings
from benchmarks.cost.process import (
    RESULTS,
    Quartiles,
    available_megabytes,
    in_turns,
    merge,
    parse,
    peak_megabytes,
    quartiles,
    run_fresh,
)
from benchmarks.cost.variants import STEPS, cosine_to_all_rows, difference, make_step

# The peak of variants that form the maps, over the size of all maps; a case that would not fit is skipped.
DENSE_FACTOR = 2.0
KEYS = ("model", "size", "batch", "depth", "variant")


@dataclass(frozen=True)
class Config:
    setting: Setting
    variants: tuple[str, ...] = STEPS
    rounds: int = 7
    warm: bool = True
    memory_steps: int = 2
    check: bool = True
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """One variant. Quartiles are (lower, median, upper) over rounds. Ratios are to the published extra; those of time
    compare medians. Peaks count what the process holds; ``kept`` peaks also count what the C allocator keeps
    (``process.GIVE_BACK``). None means not measured; ``skipped`` gives the reason."""

    model: str
    size: int
    batch: int
    depth: int
    tokens: int
    variant: str
    rounds: int
    cpu_seconds: Quartiles | None = None
    extra_cpu_seconds: Quartiles | None = None
    extra_cpu_over_published: float | None = None
    peak_mb: float | None = None
    extra_mb: float | None = None
    extra_mb_over_published: float | None = None
    kept_peak_mb: float | None = None
    kept_extra_mb: float | None = None
    kept_extra_mb_over_published: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    gradient_cosine: float | None = None  # of a share of the rows, to all rows
    skipped: str | None = None
    measured: str = field(default_factory=lambda: date.today().isoformat())  # rows of several days stand in one table


def measure(config: Config) -> list[Result]:
    fitting = [v for v in config.variants if fits(v, config.setting)]
    common = {"setting": asdict(config.setting), "threads": config.threads}
    timed = run_fresh(
        "step", {**common, "do": "time", "variants": fitting, "rounds": config.rounds, "warm": config.warm}
    )
    peaks, kept = ({v: _peak(config, v, give_back) for v in fitting} for give_back in (True, False))
    errors = {}
    if config.check and "dense" in fitting:
        for variant in fitting:
            if variant not in ("plain", "dense"):
                errors[variant] = run_fresh("step", {**common, "do": "check", "variants": [variant]})
                if variant == "rows":
                    errors[variant].append(run_fresh("step", {**common, "do": "cosine", "variants": [variant]}))
    return [_result(config, variant, timed, peaks, kept, errors) for variant in config.variants]


def _peak(config: Config, variant: str, give_back: bool) -> float:
    payload = {"setting": asdict(config.setting), "threads": config.threads, "do": "memory", "variants": [variant]}
    return run_fresh("step", {**payload, "steps": config.memory_steps}, give_back)


def fits(variant: str, setting: Setting) -> bool:
    return variant not in ("published", "dense") or setting.map_megabytes * DENSE_FACTOR < available_megabytes()


def _result(
    config: Config,
    variant: str,
    timed: dict[str, list[float]],
    peaks: dict[str, float],
    kept: dict[str, float],
    errors: dict[str, list[float]],
) -> Result:
    setting = config.setting
    about = (setting.model, setting.size, setting.batch, setting.depth, setting.tokens, variant, config.rounds)
    if variant not in timed:
        gigabytes = setting.map_megabytes * DENSE_FACTOR / 1024
        reason = f"its maps need about {gigabytes:.0f} GiB, {available_megabytes() / 1024:.0f} GiB are free"
        return Result(*about, skipped=reason)
    extra = _minus(timed[variant], timed["plain"])
    ratio, memory_ratio, kept_ratio = None, None, None
    if "published" in timed:
        published = _minus(timed["published"], timed["plain"])
        ratio = statistics.median(extra) / statistics.median(published)
        memory_ratio = (peaks[variant] - peaks["plain"]) / (peaks["published"] - peaks["plain"])
        kept_ratio = (kept[variant] - kept["plain"]) / (kept["published"] - kept["plain"])
    loss_error, gradient_error, gradient_cosine, *_ = [*errors.get(variant, []), None, None, None]
    return Result(
        *about,
        cpu_seconds=quartiles(timed[variant]),
        extra_cpu_seconds=quartiles(extra),
        extra_cpu_over_published=ratio,
        peak_mb=peaks[variant],
        extra_mb=peaks[variant] - peaks["plain"],
        extra_mb_over_published=memory_ratio,
        kept_peak_mb=kept[variant],
        kept_extra_mb=kept[variant] - kept["plain"],
        kept_extra_mb_over_published=kept_ratio,
        loss_error=loss_error,
        gradient_error=gradient_error,
        gradient_cosine=gradient_cosine,
    )


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def child(payload: dict[str, Any]) -> Any:
    """What runs in a fresh process."""
    torch.set_num_threads(payload["threads"])
    setting = Setting(**payload["setting"])
    if payload["do"] == "time":
        steps = {variant: make_step(variant, setting)[1] for variant in payload["variants"]}
        return in_turns(steps, payload["rounds"], payload["warm"])
    (variant,) = payload["variants"]
    if payload["do"] == "check":
        return difference(variant, setting)
    if payload["do"] == "cosine":
        return cosine_to_all_rows(setting)
    _, step = make_step(variant, setting)
    for _ in range(payload["steps"]):
        step()
    return peak_megabytes()


def show(results: Sequence[Result]) -> None:
    first = results[0]
    print(f"ViT-{first.model[0].upper()}, {first.size} px ({first.tokens} tokens), batch {first.batch}")
    print("variant     CPU s   extra CPU s (quartiles)  of published  peak MB  extra MB   of p. (kept)  errors")
    for r in results:
        if r.cpu_seconds is None or r.extra_cpu_seconds is None:
            print(f"{r.variant:10} skipped: {r.skipped}")
            continue
        low, extra, high = r.extra_cpu_seconds
        ratio = "-" if r.extra_cpu_over_published is None else f"{r.extra_cpu_over_published:.2f}"
        share = "-" if r.extra_mb_over_published is None else f"{r.extra_mb_over_published:.3f}"
        kept = "-" if r.kept_extra_mb_over_published is None else f"{r.kept_extra_mb_over_published:.3f}"
        errors = "" if r.loss_error is None else f"loss {r.loss_error:.0e}, gradient {r.gradient_error:.0e}"
        errors += "" if r.gradient_cosine is None else f", cosine to all rows {r.gradient_cosine:.3f}"
        print(
            f"{r.variant:10} {r.cpu_seconds[1]:6.2f}   {extra:6.2f} ({low:.2f} to {high:.2f})   {ratio:>12} "
            f"{r.peak_mb:9.0f} {r.extra_mb:9.1f} {share:>7} ({kept})  {errors}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost step", description="What the loss adds to a step.")
    add_settings(parser)
    parser.add_argument("--variants", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    parser.add_argument("--brief", action="store_true", help="no warm-up round, and one step to measure memory")
    parser.add_argument("--no-check", action="store_true", help="do not compare values and gradients")
    args = parse(parser, "step", child, arguments)
    if args is None:
        return 0
    torch.set_num_threads(Config.threads)
    for setting in settings(args):
        config = Config(
            setting,
            tuple(args.variants),
            args.rounds,
            warm=not args.brief,
            memory_steps=1 if args.brief else Config.memory_steps,
            check=not args.no_check,
        )
        results = measure(config)
        show(results)
        if args.write:
            merge(RESULTS / "step.json", [asdict(r) for r in results], KEYS)
    return 0
