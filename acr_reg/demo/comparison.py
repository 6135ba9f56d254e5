"""The comparison: the conditions, what is recorded of each, and the run that trains and scores all of them for a seed.

Every condition starts from the same checkpoint and sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, AttentionMaps, HorizontalFlip, Identity, capture_attention
from acr_reg.demo.baselines import Sample, all_background, centred_ellipse
from acr_reg.demo.scoring import Maps, Predict, Scores, Truth, class_maps, present_ids, resized, score
from acr_reg.demo.train import Training, with_grid
from acr_reg.metrics import CamScores

WITHOUT = "without ACR"
WITH = "with ACR"
ALL_BACKGROUND = "all background"
CONTROL = "ACR, flip not undone"
PICTURES = 6

# (what begins, number of steps or None) -> a function to call after each step
Report = Callable[[str, int | None], Callable[[], None]]


def losses(activation: float, affinity: float, controls: bool) -> dict[str, AllPairsConsistencyLoss | None]:
    """The consistency loss of each condition, with the given weights.

    The control compares tokens at the same position as if nothing had been flipped: its gain is smoothing, not
    consistency.
    """
    conditions: dict[str, AllPairsConsistencyLoss | None] = {
        WITHOUT: None,
        WITH: AllPairsConsistencyLoss(HorizontalFlip(), activation, affinity),
    }
    if controls:
        conditions[CONTROL] = AllPairsConsistencyLoss(Identity(), activation, affinity)
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
    """One row of the table. A baseline has `raw` class maps only."""

    name: str
    raw: MapScore
    propagated: MapScore | None = None
    mean_ap: float | None = None
    terms: dict[str, float] | None = None
    training: Training | None = None


def baseline_row(name: str, shown: CamScores, development: CamScores) -> Row:
    return Row(name, at_development_threshold(shown, development))


def background_baselines(samples: Mapping[str, Sequence[Sample]], split: str, train_labels: Tensor) -> list[Row]:
    """The baselines for data with a background. `samples` holds the splits `split` and "dev"; labels are (S,C)."""
    frequency = [0, *train_labels.sum(dim=0).int().tolist()]
    classes = len(frequency)
    ellipse = {name: centred_ellipse(found, classes, frequency) for name, found in samples.items()}
    nothing = all_background(samples[split], classes)
    return [
        baseline_row(ALL_BACKGROUND, nothing, nothing),
        baseline_row("best centred ellipse", ellipse[split], ellipse["dev"]),
    ]


def network_row(name: str, shown: Scores, development: Scores, training: Training | None) -> Row:
    return Row(
        name=name,
        raw=at_development_threshold(shown.raw, development.raw),
        propagated=at_development_threshold(shown.propagated, development.propagated),
        mean_ap=shown.mean_ap,
        terms=shown.terms,
        training=training,
    )


@dataclass(frozen=True)
class Picture:
    """An image (h,w,3), its mask (H,W), the K ids present, and the raw maps (K,H,W) in 0..1 of each condition."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    present: list[int]
    maps: dict[str, NDArray[np.floating]] = field(default_factory=dict)


# ---------------------------------------------------------------- what is compared


class Task(Protocol):
    """Scenes or photos and the model to train on them, for one seed."""

    maps: Maps
    steps: int
    grid: tuple[int, int] | None  # of the tokens, if the trained model takes tokens and not images
    pretraining: Training | None

    def fork(self) -> nn.Module:
        """A new copy of the model that every condition starts from."""

    def train(self, model: nn.Module, acr: AllPairsConsistencyLoss | None, advance: Callable[[], None]) -> Training:
        """Trains for `steps` steps. Only `acr` differs between the conditions."""

    def truths(self, split: str) -> list[Truth]:
        """The images of a split, in batches."""

    def prepare(self, images: Tensor) -> Tensor:
        """The input of the trained model for images (B,3,H,W)."""

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
    present = [present_ids(labels, task.maps.background) for labels in first.labels]
    return [Picture(*parts) for parts in zip(task.pixels(first.images), first.masks, present, strict=True)]


def draw_maps(pictures: list[Picture], name: str, predict: Predict, first: Truth, maps: Maps) -> None:
    """Adds the raw maps of one condition to each picture."""
    (cams, _), _ = class_maps(predict, first.images, first.labels, maps)
    for picture, cam, labels in zip(pictures, cams, first.labels, strict=True):
        picture.maps[name] = resized(cam[labels.nonzero()[:, 0]], picture.mask.shape).numpy()
