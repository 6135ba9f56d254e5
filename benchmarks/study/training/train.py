"""Trains the upper half of a cell, or loads the trained one from the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.overrides import TorchFunctionMode

from acr_reg import AttentionCapture, capture_attention
from acr_reg.demo.photos.task import make_optimizer
from acr_reg.demo.record import Meter
from acr_reg.demo.train import with_grid
from acr_reg.integrations.formats.write import replacing
from benchmarks.study.photos import Batch, Photos
from benchmarks.study.settings import CONDITIONS, ONE_TOKEN, Setting
from benchmarks.study.training.networks import Run, StudyNetwork, made
from benchmarks.study.training.objective import Objective

Advance = Callable[[], None]


class Float32Attention(TorchFunctionMode):
    """Runs attention in float32 under autocast. On CPUs the backward pass of torch's fused kernel takes two to four
    times as long in bfloat16 (65 and 145 tokens, torch 2.14), which is a third of a step of this study."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        with torch.autocast("cpu", enabled=False):
            return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {}))


@dataclass(frozen=True)
class TrainingRecord:
    """What a training cost, and the mean losses and terms of each epoch."""

    seconds: float
    cpu_seconds: float
    peak_memory: int | None
    steps: int
    epochs: list[dict[str, float]]


@dataclass(frozen=True, eq=False)
class Trained:
    """``entropies`` (steps, layers, 2), if they were recorded."""

    model: StudyNetwork
    record: TrainingRecord
    entropies: Tensor | None


def trained(photos: Photos, setting: Setting, seed: int, advance: Advance = lambda: None) -> Trained:
    """The cell's network: from the cache, or trained now and kept there. "smoothing" trains that of "both" first."""
    path = checkpoint_path(photos.places.cache, setting, seed)
    if path.exists():
        stored = torch.load(path, map_location="cpu", weights_only=True)
        model = made(setting.network, photos.upper(seed), photos.classes)
        model.load_state_dict({name: value.float() for name, value in stored["model"].items()})
        return Trained(model, TrainingRecord(**stored["record"]), stored["entropies"])
    targets = None
    if CONDITIONS[setting.condition].entropy_of_both:
        targets = trained(photos, replace(setting, condition="both"), seed, advance).entropies
    result = train(photos, setting, seed, targets, advance)
    _keep(path, result)
    return result


def checkpoint_path(cache: Path, setting: Setting, seed: int) -> Path:
    return cache / "models" / f"{setting.photos}-{setting.slug}-{setting.digest}-s{seed}.pt"


def _keep(path: Path, result: Trained) -> None:
    stored = {
        "model": result.model.state_dict(),
        "record": asdict(result.record),
        "entropies": result.entropies,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        torch.save(stored, unfinished)


def train(photos: Photos, setting: Setting, seed: int, targets: Tensor | None, advance: Advance) -> Trained:
    """Train one cell. Steps, batches, views, schedule and first weights are equal for every condition of a seed."""
    steps = photos.steps(setting)
    objective = Objective(setting, steps, seed, targets)
    model = made(setting.network, photos.upper(seed), photos.classes).train()
    optimizer = make_optimizer(model, setting.rate, setting.head_rate)
    scheduler = CosineAnnealingLR(optimizer, steps)
    coins = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    capture: Any = nullcontext()
    if objective.needs_maps:
        capture = capture_attention(model, double_backward=objective.condition.cam and setting.network == ONE_TOKEN)
    photos.tokens("train")  # computed before the clock runs, because all cells share them
    with Meter() as meter, capture as attention:
        for step, batch in enumerate(photos.batches(setting, seed)):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bfloat16"), Float32Attention():
                runs = _forward(model, attention, batch, objective.condition.views, coins)
            classification = sum((run.classification(batch.labels) for run in runs), torch.zeros(())) * 2 / len(runs)
            added, terms = objective(runs, batch, step)
            optimizer.zero_grad()
            (classification + added).backward()
            del runs
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            history.append({"classification": classification.item(), **terms})
            advance()
    record = TrainingRecord(
        seconds=meter.seconds,
        cpu_seconds=meter.cpu_seconds,
        peak_memory=meter.peak_memory,
        steps=steps,
        epochs=_by_epoch(history, setting.epochs),
    )
    return Trained(model, record, torch.stack(objective.recorded) if objective.recorded else None)


def _forward(
    model: StudyNetwork, attention: AttentionCapture | None, batch: Batch, views: int, coins: torch.Generator
) -> list[Run]:
    """Run both views, or one of the two for each photo, which makes the flip an ordinary augmentation."""
    if views == 1:
        mirrored = torch.rand(len(batch.tokens), 1, 1, generator=coins) < 0.5
        inputs = [(torch.where(mirrored, batch.viewed, batch.tokens), batch.grid)]
    else:
        inputs = [(batch.tokens, batch.grid), (batch.viewed, batch.viewed_grid)]
    runs = []
    for tokens, grid in inputs:
        output = model(tokens)
        runs.append(
            Run.of(output, None if attention is None else with_grid(attention.take(), grid, model.num_prefix_tokens))
        )
    return runs


def _by_epoch(history: list[dict[str, float]], epochs: int) -> list[dict[str, float]]:
    size = -(-len(history) // epochs)
    parts = [history[i : i + size] for i in range(0, len(history), size)]
    return [{name: sum(step[name] for step in part) / len(part) for name in part[0]} for part in parts]
