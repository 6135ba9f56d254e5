"""The comparison: the conditions, what is recorded of each, and the run that trains and scores all of them for a seed.

Every condition starts from the same checkpoint and sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, Identity
from acr_reg.demo.baselines import Sample, all_background, centred_ellipse
from acr_reg.demo.scoring import Read, Scores, Truth, class_maps, present_ids, resized, score
from acr_reg.demo.train import Training
from acr_reg.metrics import CamScores

WITHOUT = "without ACR"
WITH = "with ACR"
ALL_BACKGROUND = "all background"
CONTROL = "ACR, flip not undone"
PICTURES = 6

# (what begins, number of steps or None) -> a function to call after each step
Report = Callable[[str, int | None], Callable[[], None]]


def losses(activation: float, affinity: float, cam: float, controls: bool) -> dict[str, AllPairsConsistencyLoss | None]:
    """The consistency loss of each condition, with the given weights.

    The control compares tokens at the same position as if nothing had been flipped: its gain is smoothing, not
    consistency.
    """
    conditions: dict[str, AllPairsConsistencyLoss | None] = {
        WITHOUT: None,
        WITH: AllPairsConsistencyLoss(HorizontalFlip(), activation, affinity, cam_weight=cam),
    }
    if controls:
        conditions[CONTROL] = AllPairsConsistencyLoss(Identity(), activation, affinity, cam_weight=cam)
    return conditions


# ---------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class MapScore:
    """mIoU of class maps on the scored split, at the background threshold that is best on the development split."""

    miou: float
    threshold: float | None
    thresholds: list[float]
    curve: list[float]
    per_class_iou: list[float | None]


def at_development_threshold(shown: CamScores, development: CamScores) -> MapScore:
    index = int(np.argmax(development.miou))
    return MapScore(
        miou=float(shown.miou[index]),
        threshold=development.best_threshold,
        thresholds=shown.thresholds.tolist(),
        curve=shown.miou.tolist(),
        per_class_iou=[None if np.isnan(iou) else float(iou) for iou in shown.per_class_iou],
    )


@dataclass(frozen=True)
class Row:
    """One row of the table. `maps` holds the scores of its class maps by their name, the ones that people use first.

    A baseline has these only.
    """

    name: str
    maps: dict[str, MapScore]
    mean_ap: float | None = None
    terms: dict[str, float] | None = None
    training: Training | None = None

    @property
    def headline(self) -> MapScore:
        return next(iter(self.maps.values()))


def baseline_row(name: str, maps: str, shown: CamScores, development: CamScores) -> Row:
    """`maps` are the class maps of the networks that the baseline is compared with."""
    return Row(name, {maps: at_development_threshold(shown, development)})


def background_baselines(
    samples: Mapping[str, Sequence[Sample]], split: str, train_labels: Tensor, maps: str
) -> list[Row]:
    """The baselines for data with a background. `samples` holds the splits `split` and "dev"; labels are (S,C)."""
    frequency = [0, *train_labels.sum(dim=0).int().tolist()]
    classes = len(frequency)
    ellipse = {name: centred_ellipse(found, classes, frequency) for name, found in samples.items()}
    nothing = all_background(samples[split], classes)
    return [
        baseline_row(ALL_BACKGROUND, maps, nothing, nothing),
        baseline_row("best centred ellipse", maps, ellipse[split], ellipse["dev"]),
    ]


def network_row(name: str, shown: Scores, development: Scores, training: Training) -> Row:
    maps = {kind: at_development_threshold(found, development.maps[kind]) for kind, found in shown.maps.items()}
    return Row(name, maps, shown.mean_ap, shown.terms, training)


@dataclass(frozen=True)
class Picture:
    """An image (h,w,3), its mask (H,W), the K ids present, and the maps (K,H,W) in 0..1 of each condition."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    present: list[int]
    maps: dict[str, NDArray[np.floating]] = field(default_factory=dict)


# ---------------------------------------------------------------- what is compared


class Task(Protocol):
    """Scenes or photos and the model to train on them, for one seed."""

    background: bool  # whether id 0 in the masks is background
    steps: int
    pretraining: Training | None

    def fork(self) -> nn.Module:
        """A new copy of the model that every condition starts from."""

    def train(self, model: nn.Module, acr: AllPairsConsistencyLoss | None, advance: Callable[[], None]) -> Training:
        """Trains for `steps` steps. Only `acr` differs between the conditions."""

    def truths(self, split: str) -> list[Truth]:
        """The images of a split, in batches."""

    def reading(self, model: nn.Module) -> AbstractContextManager[Read]:
        """Reads the trained model. The maps that come first are the ones that people use."""

    def baselines(self, split: str) -> list[Row]:
        """Rows that use no network."""

    def pixels(self, images: Tensor) -> np.ndarray:
        """Images (B,3,H,W) as uint8 (B,H,W,3), for pictures."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    `where` completes "ACR helps ..."; `notes` accompany every result; `names[i]` is the class with id i in the masks;
    `start` makes the task of a seed. Class maps mean nothing if the mean average precision is below `needed_map`, or
    if the run is `quick`.
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
    """Scores baselines and conditions on `split`, at the thresholds of "dev", and draws maps of its first images."""
    report("preparing images and model", None)
    task = plan.start(seed, report)
    report("baselines", None)
    rows = task.baselines(split)
    report("preparing the scored images", None)
    development = task.truths("dev")
    shown = development if split == "dev" else task.truths(split)
    first = first_images(shown[0], PICTURES)
    pictures = blank_pictures(task, first)
    for name, acr in plan.conditions.items():
        model = task.fork()
        training = task.train(model, acr, report(f"training {name}", task.steps))
        advance = report(f"scoring {name}", len(development) + (0 if split == "dev" else len(shown)))
        with task.reading(model) as read:
            found = score(read, development, task.background, advance)
            scores = found if split == "dev" else score(read, shown, task.background, advance)
            draw_maps(pictures, name, read, first)
        rows.append(network_row(name, scores, found, training))
    return SeedResult(seed, rows, task.pretraining, pictures)


def first_images(truth: Truth, count: int) -> Truth:
    return Truth(truth.images[:count], truth.labels[:count], truth.masks[:count])


def blank_pictures(task: Task, first: Truth) -> list[Picture]:
    present = [present_ids(labels, task.background) for labels in first.labels]
    return [Picture(*parts) for parts in zip(task.pixels(first.images), first.masks, present, strict=True)]


def draw_maps(pictures: list[Picture], name: str, read: Read, first: Truth) -> None:
    """Adds the maps that people use, of one condition, to each picture."""
    maps, _ = class_maps(read, first.images, first.labels)
    cams = next(iter(maps.values()))
    for picture, cam, labels in zip(pictures, cams, first.labels, strict=True):
        picture.maps[name] = resized(cam[labels.nonzero()[:, 0]], picture.mask.shape).numpy()
