"""What the capture alone adds to a forward in training: process CPU time, in one process, interleaved.

    python -m benchmarks.cost capture            # ViT-S/16 at 224 px, one image; about two minutes
    python -m benchmarks.cost capture --write    # also benchmarks/cost/results/capture.json

A pair is one block of forwards without and one with the capture (and take()), in turns, so that both feel the same load
of the machine. Beside the model itself a narrow copy of it is timed, whose forward is so short that the same added work
stands out of the noise. Memory: ``python -m pytest tests/capture/test_memory.py`` counts it to the byte.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import timm
import torch
from torch import Tensor, nn

from acr_reg import AttentionCapture, capture_attention
from benchmarks.cost.process import RESULTS


@dataclass(frozen=True)
class Config:
    model: str = "vit_small_patch16_224"
    narrow_width: int = 24  # of the copy: as many layers and calls, hardly any arithmetic
    image: int = 224
    batch: int = 1
    forwards: int = 1
    pairs: int = 200
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """Milliseconds of process CPU time a forward: medians, the quartiles of the paired differences, and the difference
    of the lower deciles, which the load of a shared machine moves least."""

    model: str
    without: float
    with_capture: float
    added: float
    added_quartiles: tuple[float, float]
    added_percent: float
    added_in_quiet: float
    largest_output_change: float


def measure(name: str, model: nn.Module, images: Tensor, config: Config) -> Result:
    plain = model(images).detach()
    with capture_attention(model) as attention:
        model(images)
        change = 0.0
        attention.take()  # from here on only attention modules are watched
        without, having = [], []
        for pair in range(config.pairs):
            for captured in (pair % 2 == 0, pair % 2 == 1):
                milliseconds, output = _time(model, images, attention if captured else None, config.forwards)
                (having if captured else without).append(milliseconds)
                change = max(change, (output - plain).abs().max().item())
    added = [b - a for a, b in zip(without, having, strict=True)]
    quartiles = statistics.quantiles(added, n=4)
    return Result(
        name,
        statistics.median(without),
        statistics.median(having),
        statistics.median(added),
        (quartiles[0], quartiles[2]),
        100 * statistics.median(added) / statistics.median(without),
        statistics.quantiles(having, n=10)[0] - statistics.quantiles(without, n=10)[0],
        change,
    )


def _time(model: nn.Module, images: Tensor, attention: AttentionCapture | None, forwards: int) -> tuple[float, Tensor]:
    hooks = {} if attention is not None else _unhook(model)
    begin = time.process_time_ns()
    for _ in range(forwards):
        output = model(images)
        if attention is not None:
            attention.take()
    spent = (time.process_time_ns() - begin) / forwards / 1e6
    for module, saved in hooks.items():
        vars(module).update(saved)
    return spent, output.detach()


def _unhook(model: nn.Module) -> dict[nn.Module, dict[str, object]]:
    """Takes all hooks off, to be put back: removing and adding them anew would cost more than a forward."""
    saved = {}
    for module in model.modules():
        saved[module] = {name: value for name, value in vars(module).items() if "_hooks" in name}
        vars(module).update({name: type(value)() for name, value in saved[module].items()})  # type: ignore[operator]
    return saved


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="CPU time that the capture adds to a forward.")
    parser.add_argument("--pairs", type=int, default=Config.pairs)
    parser.add_argument("--write", action="store_true", help="write benchmarks/cost/results/capture.json")
    args = parser.parse_args(arguments)
    config = Config(pairs=args.pairs)
    torch.manual_seed(0)
    torch.set_num_threads(config.threads)
    model = timm.create_model(config.model, num_classes=20).train()
    narrow = timm.create_model(
        config.model, num_classes=20, img_size=32, embed_dim=config.narrow_width, num_heads=3
    ).train()
    results = [
        measure(config.model, model, torch.randn(config.batch, 3, config.image, config.image), config),
        measure(
            f"{config.model}, {config.narrow_width} wide, 32 px", narrow, torch.randn(config.batch, 3, 32, 32), config
        ),
    ]
    print(f"torch {torch.__version__}, {platform.machine()}, {config.threads} thread, ms of process CPU time a forward")
    for r in results:
        low, high = r.added_quartiles
        print(
            f"{r.model:42} without {r.without:8.2f}  with {r.with_capture:8.2f}  added {r.added:6.2f} "
            f"(quartiles {low:.2f} to {high:.2f}; of lower deciles {r.added_in_quiet:.2f}), {r.added_percent:.1f} %; "
            f"output change {r.largest_output_change:g}"
        )
    if args.write:
        record = {"torch": torch.__version__, "config": asdict(config), "results": [asdict(r) for r in results]}
        path = RESULTS / "capture.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0
