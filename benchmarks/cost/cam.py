"""CPU time and peak memory of class maps of an image and its flip, compared with the published procedure.

    python -m benchmarks.cost cam            # ViT-S at 384 px, one image, 1, 2 and 5 present classes
    python -m benchmarks.cost cam --write    # also into benchmarks/cost/results/cam.json

Four variants are compared: the forward passes of both views without gradient (forward), the published procedure (a full
backward pass for each class and view), and the library's GradientCam with and without propagation. All variants are
timed in turns in one process, in process CPU time. Peak memory is measured in a fresh process for each variant. The
command also prints how far the library's maps are from the published ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.cost.models import Setting, add_settings, settings
from benchmarks.cost.process import RESULTS, Quartiles, in_turns, merge, parse, peak_megabytes, quartiles, run_fresh
from benchmarks.cost.variants import CAMS, UNPROPAGATED, make_cam

KEYS = ("model", "size", "batch", "present", "variant")


@dataclass(frozen=True)
class Config:
    setting: Setting
    variants: tuple[str, ...] = (*CAMS, UNPROPAGATED)
    rounds: int = 9
    memory_calls: int = 2
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """One variant. Quartiles are (lower, median, upper) over rounds; ratios are computed in each round."""

    model: str
    size: int
    batch: int
    present: int
    variant: str
    rounds: int
    cpu_seconds: Quartiles
    over_forward: Quartiles
    published_over_this: Quartiles
    peak_mb: float
    extra_mb: float
    extra_mb_over_published: float
    map_error: float | None


def measure(config: Config) -> list[Result]:
    common = {"setting": asdict(config.setting), "threads": config.threads}
    timed = run_fresh("cam", {**common, "do": "time", "variants": config.variants, "rounds": config.rounds})
    spent, error = timed["spent"], timed["error"]
    peaks = {
        v: run_fresh("cam", {**common, "do": "memory", "variants": [v], "calls": config.memory_calls}, give_back=True)
        for v in config.variants
    }
    setting, whole = config.setting, peaks["published"] - peaks["forward"]
    return [
        Result(
            setting.model,
            setting.size,
            setting.batch,
            setting.present,
            variant,
            config.rounds,
            quartiles(spent[variant]),
            quartiles([s / f for s, f in zip(spent[variant], spent["forward"], strict=True)]),
            quartiles([p / s for p, s in zip(spent["published"], spent[variant], strict=True)]),
            peaks[variant],
            peaks[variant] - peaks["forward"],
            (peaks[variant] - peaks["forward"]) / whole,
            error if variant == "library" else None,
        )
        for variant in config.variants
    ]


def child(payload: dict[str, Any]) -> Any:
    """What runs in a fresh process."""
    torch.set_num_threads(payload["threads"])
    setting = Setting(**payload["setting"])
    calls = {variant: make_cam(variant, setting) for variant in payload["variants"]}
    if payload["do"] == "time":
        spent = in_turns(calls, payload["rounds"])
        return {"spent": spent, "error": map_error(calls["library"](), calls["published"]())}
    (call,) = calls.values()
    for _ in range(payload["calls"]):
        call()
    return peak_megabytes()


def map_error(ours: torch.Tensor, published: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - published).abs().max() / published.max()).item()


def show(results: Sequence[Result]) -> None:
    first = results[0]
    print(f"ViT-{first.model[0].upper()}, {first.size} px, batch {first.batch}, {first.present} present classes")
    for r in results:
        (low, over, high), times = r.over_forward, r.published_over_this[1]
        error = "" if r.map_error is None else f"  maps differ by {r.map_error:.0e}"
        print(
            f"{r.variant:16} {r.cpu_seconds[1]:6.2f} s, {over:5.2f} x forward ({low:.2f} to {high:.2f}); published "
            f"takes {times:5.2f} x as long; peak {r.peak_mb:6.0f} MB, extra {r.extra_mb:7.1f} MB, "
            f"{r.extra_mb_over_published:.3f} x published{error}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost cam", description="Time and memory of class maps.")
    add_settings(parser)
    parser.add_argument("--present", nargs="+", type=int, default=[1, 2, 5])
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    args = parse(parser, "cam", child, arguments)
    if args is None:
        return 0
    torch.set_num_threads(Config.threads)
    for setting in settings(args):
        for present in args.present:
            results = measure(Config(replace(setting, present=present), rounds=args.rounds))
            show(results)
            if args.write:
                merge(RESULTS / "cam.json", [asdict(r) for r in results], KEYS)
    return 0
