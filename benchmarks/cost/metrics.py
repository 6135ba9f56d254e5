"""CPU time and memory of mIoU at 100 background thresholds: a pass for each threshold, or the library's single pass.

    python -m benchmarks.cost metrics            # 6 images of 366 x 500 px, 21 ids, 1 to 3 classes each
    python -m benchmarks.cost metrics --write    # also benchmarks/cost/results/metrics.json

All variants are timed in turns in one process, in process CPU time. The sweep is timed over an array of all ids, as the
usual scripts write it, and over the maps of the present classes alone. The command also prints the largest difference
of mIoU at any threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from acr_reg import CamMeanIoU
from benchmarks.cost.process import RESULTS, Quartiles, in_turns, merge, parse, peak_megabytes, quartiles, run_fresh
from benchmarks.cost.published import sweep

VARIANTS = ("sweep, all ids", "sweep, present", "library")


@dataclass(frozen=True)
class Config:
    images: int = 6
    height: int = 366
    width: int = 500
    num_classes: int = 21
    most_present: int = 3
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One variant. Quartiles are (lower, median, upper) over rounds; ``extra_mb`` is beyond the images alone."""

    variant: str
    rounds: int
    images: int
    cpu_seconds: Quartiles
    times_library: Quartiles
    extra_mb: float
    miou_difference: float


@dataclass(frozen=True)
class Pictures:
    """Maps (K, H, W) in [0, 1], masks (H, W) with an ignored border, and the ids of the maps."""

    cams: list[np.ndarray]
    masks: list[np.ndarray]
    classes: list[list[int]]


def pictures(config: Config) -> Pictures:
    random = np.random.default_rng(config.seed)
    found = Pictures([], [], [])
    for _ in range(config.images):
        count = random.integers(1, config.most_present + 1)
        ids = sorted(random.choice(np.arange(1, config.num_classes), count, replace=False).tolist())
        found.cams.append(random.random((count, config.height, config.width), dtype=np.float32))
        mask = random.choice(np.array([0, *ids], dtype=np.uint8), (config.height, config.width))
        mask[:4] = 255
        found.masks.append(mask)
        found.classes.append(ids)
    return found


def score(variant: str, given: Pictures, num_classes: int) -> np.ndarray:
    """mIoU (100,)."""
    if variant != "library":
        return sweep(given.cams, given.masks, given.classes, num_classes, all_maps=variant == "sweep, all ids")
    metric = CamMeanIoU(num_classes)
    for cam, mask, ids in zip(given.cams, given.masks, given.classes, strict=True):
        metric.update(cam, mask, ids)
    return metric.compute().miou


def measure(config: Config) -> list[Result]:
    given = pictures(config)
    found: dict[str, np.ndarray] = {}

    def timed(variant: str) -> None:
        found[variant] = score(variant, given, config.num_classes)

    spent = in_turns({v: partial(timed, v) for v in VARIANTS}, config.rounds, warm=False)
    images_alone = run_fresh("metrics", {"config": asdict(config), "variant": None})
    return [
        Result(
            variant,
            config.rounds,
            config.images,
            quartiles(spent[variant]),
            quartiles([s / ours for s, ours in zip(spent[variant], spent["library"], strict=True)]),
            run_fresh("metrics", {"config": asdict(config), "variant": variant}) - images_alone,
            float(np.abs(found[variant] - found["library"]).max()),
        )
        for variant in VARIANTS
    ]


def child(payload: dict[str, Any]) -> float:
    """What runs in a fresh process."""
    config = Config(**payload["config"])
    given = pictures(config)
    if payload["variant"] is not None:
        score(payload["variant"], given, config.num_classes)
    return peak_megabytes()


def show(results: Sequence[Result]) -> None:
    for r in results:
        (low, times, high) = r.times_library
        print(
            f"{r.variant:15} {1000 * r.cpu_seconds[1] / r.images:8.1f} ms an image, {times:6.1f} x library ({low:.1f} "
            f"to {high:.1f}), extra {r.extra_mb:5.1f} MB, mIoU differs by {r.miou_difference:.1e}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost metrics", description="Time and memory of scoring.")
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    args = parse(parser, "metrics", child, arguments)
    if args is None:
        return 0
    config = Config(rounds=args.rounds)
    results = measure(config)
    show(results)
    if args.write:
        merge(RESULTS / "metrics.json", [asdict(r) for r in results], ("variant",), config=asdict(config))
    return 0
