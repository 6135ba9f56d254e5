"""The conditions that are compared, and what is recorded of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, Identity
from acr_reg.demo.scoring import Scores
from acr_reg.demo.train import Training
from acr_reg.metrics import CamScores

WITHOUT = "without ACR"
WITH = "with ACR"
CONTROL = "ACR, flip not undone"


def losses(activation: float, affinity: float, controls: bool) -> dict[str, AllPairsConsistencyLoss | None]:
    """The consistency loss of every condition. The control compares token with token as if nothing had been flipped:
    what it gains is smoothing, not consistency."""
    conditions: dict[str, AllPairsConsistencyLoss | None] = {
        WITHOUT: None,
        WITH: AllPairsConsistencyLoss(HorizontalFlip(), activation, affinity),
    }
    if controls:
        conditions[CONTROL] = AllPairsConsistencyLoss(Identity(), activation, affinity)
    return conditions


@dataclass(frozen=True)
class MapScore:
    """mIoU of class maps on the split shown, at the background threshold that was best on the development split."""

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
    """One row of the table. Baselines have class maps only: `raw`."""

    name: str
    raw: MapScore
    propagated: MapScore | None = None
    mean_ap: float | None = None
    terms: dict[str, float] | None = None
    training: Training | None = None


def baseline_row(name: str, shown: CamScores, development: CamScores) -> Row:
    return Row(name, at_development_threshold(shown, development))


def network_row(name: str, shown: Scores, development: Scores, training: Training | None) -> Row:
    return Row(
        name=name,
        raw=at_development_threshold(shown.raw, development.raw),
        propagated=at_development_threshold(shown.propagated, development.propagated),
        mean_ap=shown.mean_ap,
        terms=shown.terms,
        training=training,
    )
