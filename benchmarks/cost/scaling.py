"""How memory and CPU time of a training step grow with the number of tokens, from 196 to 4096.

    python -m benchmarks.cost scaling            # ViT-Ti, one image; about 15 minutes
    python -m benchmarks.cost scaling --write    # also results/scaling.json and docs/explanation/cost.png
    python -m benchmarks.cost scaling --plot     # docs/explanation/cost.png from the results in the JSON

The steps of step.py run at several image sizes. The slope is that of the extra over the plain step on logarithmic axes:
1 is linear in the number of tokens, 2 is quadratic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cost import step as cost_step
from benchmarks.cost.models import Setting
from benchmarks.cost.process import RESULTS, merge
from benchmarks.cost.variants import STEPS

ROWS = RESULTS / "scaling.json"
PLOT = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "cost.png"


@dataclass(frozen=True)
class Config:
    model: str = "tiny"
    sizes: tuple[int, ...] = (224, 320, 448, 640, 896, 1024)
    rounds: int = 5
    rounds_of_large: int = 1
    large: int = 640  # from this size on a round takes minutes: few rounds, and no warm-up, are enough
    threads: int = 1


@dataclass(frozen=True)
class Slope:
    """d log(extra) / d log(tokens), by least squares over the sizes measured; None for fewer than two sizes."""

    variant: str
    sizes: tuple[int, ...]
    memory: float | None
    cpu: float | None


def measure(config: Config, size: int) -> list[cost_step.Result]:
    large = size >= config.large
    rounds = config.rounds_of_large if large else config.rounds
    setting = Setting(config.model, size)
    return cost_step.measure(
        cost_step.Config(setting, rounds=rounds, warm=not large, memory_steps=1, check=size == min(config.sizes))
    )


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[Slope]:
    found = []
    for variant in (v for v in STEPS if v != "plain"):
        of_variant = [r for r in rows if r["variant"] == variant and r["skipped"] is None]
        of_variant.sort(key=lambda r: r["tokens"])
        memory = [(r["tokens"], r["extra_mb"]) for r in of_variant]
        cpu = [(r["tokens"], r["extra_cpu_seconds"][1]) for r in of_variant]
        found.append(Slope(variant, tuple(r["size"] for r in of_variant), _slope(memory), _slope(cpu)))
    return found


def _slope(points: Sequence[tuple[int, float]]) -> float | None:
    points = [(x, y) for x, y in points if y > 0]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "published": ("published procedure", "#b2182b", "o"),
        "dense": ("this library, dense", "#ef8a62", "s"),
        "blockwise": ("blockwise", "#2166ac", "o"),
        "rows": ("blockwise, rows=0.25", "#67a9cf", "s"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    wanted = (
        ("extra_mb", "extra peak memory, MB"),
        ("extra_cpu_seconds", "extra CPU time a step, s (where above noise)"),
    )
    for axis, (key, title) in zip(axes, wanted, strict=True):
        for variant, (label, colour, marker) in styles.items():
            measured = sorted(
                (r["tokens"], (r[key], r[key]) if key == "extra_mb" else r[key][:2])
                for r in rows
                if r["variant"] == variant and r["skipped"] is None
            )
            points = [(tokens, value) for tokens, (low, value) in measured if low > 0]  # others are noise around 0
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=1.8)
        ticks = sorted({r["tokens"] for r in rows})
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(t) for t in ticks], rotation=35)
        axis.minorticks_off()
        axis.set_xlabel("tokens (patches)")
        axis.set_title(title, fontsize=11)
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    size = {"tiny": "Ti", "small": "S", "base": "B"}[rows[0]["model"]]
    figure.suptitle(f"What the loss adds to a plain two-view step of ViT-{size}/16, batch 1, CPU", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cost scaling", description="How the cost of the loss grows with the number of tokens."
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=Config.sizes)
    parser.add_argument("--write", action="store_true", help="merge the results into the JSON and draw the plot")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the JSON, measure nothing")
    args = parser.parse_args(arguments)
    torch.set_num_threads(Config.threads)
    config = Config(sizes=tuple(args.sizes))
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text())["results"] if args.plot else []
    for size in () if args.plot else config.sizes:
        results = measure(config, size)
        cost_step.show(results)
        rows += [asdict(r) for r in results]
        if args.write:  # after each size: the largest takes minutes
            rows = merge(ROWS, rows, cost_step.KEYS, config=asdict(config))
    for slope in slopes(rows):
        if slope.memory is not None and slope.cpu is not None:
            print(f"{slope.variant:10} slope of extra memory {slope.memory:.2f}, of extra CPU time {slope.cpu:.2f}")
    if args.write:
        about = {"config": asdict(config), "slopes": [asdict(s) for s in slopes(rows)]}
        merge(ROWS, rows, cost_step.KEYS, **about)
    if args.write or args.plot:
        plot(rows, PLOT)
    return 0
