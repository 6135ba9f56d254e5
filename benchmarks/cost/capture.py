"""CPU time that the capture alone adds to a forward pass in training.

    python -m benchmarks.cost capture            # ViT-S/16 at 224 px, one image; about two minutes
    python -m benchmarks.cost capture --write    # also benchmarks/cost/results/capture.json

A round is a block of forward passes without anything, one under a function mode of torch that only hands calls on, and
one with the capture (and take()), in turns, so that the load of the machine affects all alike. No capture by a mode can
cost less than that mode. Times are process CPU time. A narrow copy of the model is timed too: its forward pass is so
short that the added work stands out of the noise. ``python -m pytest tests/capture/test_memory.py`` counts the memory
to the byte.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acr_reg import AttentionCapture, capture_attention
from acr_reg.demo.record import write_json
from benchmarks.cost.process import RESULTS


@dataclass(frozen=True)
class Config:
    model: str = "vit_small_patch16_224"
    narrow_width: int = 24  # of the copy: the same layers and calls, hardly any arithmetic
    image: int = 224
    batch: int = 1
    forwards: int = 1
    rounds: int = 200
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """Milliseconds of process CPU time per forward pass: medians, the quartiles of the differences within a round, and
    the difference of the lower deciles, which the load of a shared machine changes least."""

    model: str
    without: float
    with_capture: float
    added: float
    added_quartiles: tuple[float, float]
    added_percent: float
    added_in_quiet: float
    added_by_mode: float
    largest_output_change: float


class HandsOn(TorchFunctionMode):
    """Sees every function, as the capture does, and does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def measure(name: str, model: nn.Module, images: Tensor, config: Config) -> Result:
    plain = model(images).detach()
    with capture_attention(model) as attention:
        model(images)
        change = 0.0
        attention.take()  # from here on only attention modules are watched
        without: list[float] = []
        under_mode: list[float] = []
        having: list[float] = []
        kinds = [(without, None, False), (under_mode, None, True), (having, attention, False)]
        for number in range(config.rounds):
            for times, captured, mode in kinds[number % 3 :] + kinds[: number % 3]:
                milliseconds, output = _time(model, images, captured, mode, config.forwards)
                times.append(milliseconds)
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
        statistics.median(b - a for a, b in zip(without, under_mode, strict=True)),
        change,
    )


def _time(
    model: nn.Module, images: Tensor, attention: AttentionCapture | None, mode: bool, forwards: int
) -> tuple[float, Tensor]:
    hooks = {} if attention is not None else _unhook(model)
    begin = time.process_time_ns()
    with HandsOn() if mode else nullcontext():
        for _ in range(forwards):
            output = model(images)
            if attention is not None:
                attention.take()
    spent = (time.process_time_ns() - begin) / forwards / 1e6
    for module, saved in hooks.items():
        vars(module).update(saved)
    return spent, output.detach()


def _unhook(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """Take all hooks off and return them: to remove and register them would cost more than a forward pass."""
    saved: dict[nn.Module, dict[str, Any]] = {}
    for module in model.modules():
        saved[module] = {name: value for name, value in vars(module).items() if "_hooks" in name}
        vars(module).update({name: type(value)() for name, value in saved[module].items()})
    return saved


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cost capture", description="Time that the capture adds.")
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    parser.add_argument("--write", action="store_true", help="write benchmarks/cost/results/capture.json")
    args = parser.parse_args(arguments)
    config = Config(rounds=args.rounds)
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
    print(f"torch {torch.__version__}, {platform.machine()}, {config.threads} thread; ms of CPU time per forward pass")
    for r in results:
        low, high = r.added_quartiles
        print(
            f"{r.model:42} without {r.without:8.2f}  with {r.with_capture:8.2f}  added {r.added:6.2f} "
            f"(quartiles {low:.2f} to {high:.2f}; of lower deciles {r.added_in_quiet:.2f}), {r.added_percent:.1f} %; "
            f"by a mode alone {r.added_by_mode:.2f}; output change {r.largest_output_change:g}"
        )
    if args.write:
        write_json(RESULTS / "capture.json", {"torch": torch.__version__, "config": config, "results": results})
    return 0
