"""Trains one task under every condition, from the same checkpoint on the same batches, and scores the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, capture_attention
from acr_reg.demo.conditions import Row, network_row
from acr_reg.demo.pictures import Picture
from acr_reg.demo.scoring import Maps, Predict, Truth, class_maps, resized, score
from acr_reg.demo.train import Training, with_grid

PICTURES = 6

Report = Callable[[str, int], Callable[[], None]]  # (what begins, in how many steps) -> called after each step


class Task(Protocol):
    """Scenes or photos with a model to train on them, for one seed."""

    maps: Maps
    steps: int
    grid: tuple[int, int] | None  # of the tokens, where the model trained is given tokens
    pretraining: Training | None

    def fork(self) -> nn.Module:
        """A new copy of the model that every condition starts from."""

    def train(self, model: nn.Module, acr: AllPairsConsistencyLoss | None, advance: Callable[[], None]) -> Training:
        """`steps` steps, the same for every condition but for `acr`."""

    def truths(self, split: str) -> list[Truth]:
        """The images of a split in batches."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) as the model trained is given them."""

    def baselines(self, split: str) -> list[Row]:
        """Rows that know no network."""

    def pixels(self, images: Tensor) -> np.ndarray:
        """Images (B,3,H,W) as uint8 (B,H,W,3), to be looked at."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    `where` completes "ACR helps ..."; `notes` stand beside every figure; `names` are those of the masks' ids;
    `needed_map` is the mean average precision below which class maps mean nothing, as they do in a `quick` look;
    `start` makes the task of a seed.
    """

    title: str
    where: str
    notes: tuple[str, ...]
    names: tuple[str, ...]
    background: bool
    settings: object
    conditions: dict[str, AllPairsConsistencyLoss | None]
    start: Callable[[int, Report], Task]
    needed_map: float = 0.0
    quick: bool = False


@dataclass(frozen=True)
class SeedResult:
    seed: int
    rows: list[Row]
    pretraining: Training | None
    pictures: list[Picture]


def run_seed(plan: Plan, seed: int, split: str, report: Report) -> SeedResult:
    """Rows for baselines and conditions on `split`, with thresholds from "dev", and pictures of its first images."""
    task = plan.start(seed, report)
    rows = task.baselines(split)
    development = task.truths("dev")
    shown = development if split == "dev" else task.truths(split)
    first = first_images(shown[0], PICTURES)
    pictures = blank_pictures(task, first)
    for name, acr in plan.conditions.items():
        model = task.fork()
        training = task.train(model, acr, report(f"training {name}", task.steps))
        advance = report(f"scoring {name}", len(development) + (0 if split == "dev" else len(shown)))
        with predicting(model, task) as predict:
            found = score(predict, development, task.maps, advance)
            scores = found if split == "dev" else score(predict, shown, task.maps, advance)
            draw_maps(pictures, name, predict, first, task.maps)
        rows.append(network_row(name, scores, found, training))
    return SeedResult(seed, rows, task.pretraining, pictures)


@contextmanager
def predicting(model: nn.Module, task: Task) -> Iterator[Predict]:
    model.eval()
    with capture_attention(model) as attention:

        def predict(images: Tensor) -> tuple[Tensor, AttentionMaps]:
            logits = model(task.prepare(images))
            return logits, with_grid(attention.take(), task.grid)

        yield predict


def first_images(truth: Truth, count: int) -> Truth:
    return Truth(truth.images[:count], truth.labels[:count], truth.masks[:count])


def blank_pictures(task: Task, first: Truth) -> list[Picture]:
    present = [(labels.nonzero()[:, 0] + int(task.maps.background)).tolist() for labels in first.labels]
    return [Picture(*parts) for parts in zip(task.pixels(first.images), first.masks, present, strict=True)]


def draw_maps(pictures: list[Picture], name: str, predict: Predict, first: Truth, maps: Maps) -> None:
    """Adds the raw maps of one condition to every picture."""
    (cams, _), _ = class_maps(predict, first.images, first.labels, maps)
    for picture, cam, labels in zip(pictures, cams, first.labels, strict=True):
        picture.maps[name] = resized(cam[labels.nonzero()[:, 0]], picture.mask.shape).numpy()
