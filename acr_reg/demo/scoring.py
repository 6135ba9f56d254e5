"""Scores a trained model: its classification, its class maps by every reading, its attention across two views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    HorizontalFlip,
    Identity,
    multi_view_cam,
    normalize_cam,
)
from acr_reg.metrics import CamMeanIoU, CamScores


@dataclass(frozen=True)
class Truth:
    """Images (B,3,H,W), their labels (B,C), and their masks (H',W') of class ids, 255 where unknown."""

    images: Tensor
    labels: Tensor
    masks: Sequence[np.ndarray]


def present_ids(labels: Tensor, background: bool) -> list[int]:
    """The mask ids of an image's labels (C,). With a background, id 0, class c has id c + 1."""
    return (labels.nonzero()[:, 0] + int(background)).tolist()


@dataclass(frozen=True)
class Reading:
    """Logits (B,C), attention, and class maps (B,C,h,w) by their name, of one view of the images."""

    logits: Tensor
    attention: AttentionMaps
    maps: dict[str, Tensor]


Read = Callable[[Tensor, Tensor], Reading]  # of images (B,3,H,W) and their labels (B,C)


@dataclass(frozen=True)
class Scores:
    """`mean_ap` is the mean average precision. `maps` holds the scores of each kind of class map. `terms` holds the
    distance per row between the attention of the two views, and the entropy of the attention."""

    mean_ap: float
    maps: dict[str, CamScores]
    terms: dict[str, float]


def score(read: Read, batches: Iterable[Truth], background: bool, advance: Callable[[], None]) -> Scores:
    """`advance` is called after each batch. With a `background`, id 0 in the masks is background."""
    measure = AllPairsConsistencyLoss(HorizontalFlip())
    logits, labels, terms, sizes = [], [], [], []
    counters: dict[str, CamMeanIoU] = {}
    for batch in batches:
        maps, readings = class_maps(read, batch.images, batch.labels)
        for name, cams in maps.items():
            counter = counters.setdefault(name, CamMeanIoU(batch.labels.shape[1] + background, background=background))
            count(counter, cams, batch, background)
        with torch.no_grad():
            _, found = measure(*(r.attention.detach() for r in readings), labels=batch.labels, return_terms=True)
        logits.append(readings[0].logits.detach())
        labels.append(batch.labels)
        terms.append({name: term.item() for name, term in found.items()})
        sizes.append(len(batch.images))
        advance()
    means = {name: float(np.average([t[name] for t in terms], weights=sizes)) for name in terms[0]}
    scores = {name: counter.compute() for name, counter in counters.items()}
    return Scores(mean_average_precision(torch.cat(logits), torch.cat(labels)), scores, means)


def class_maps(read: Read, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], list[Reading]]:
    """Class maps (B,C,h,w) by their name, each summed over the image and its flip, and the readings of both."""
    readings: list[Reading] = []

    def together(view: Tensor) -> Tensor:
        readings.append(read(view, labels))
        return torch.cat(list(readings[-1].maps.values()), dim=1)

    cams = multi_view_cam(together, images, [Identity(), HorizontalFlip()]).split(labels.shape[1], dim=1)
    return dict(zip(readings[0].maps, cams, strict=True)), readings


def count(counter: CamMeanIoU, cams: Tensor, batch: Truth, background: bool) -> None:
    for cam, labels, mask in zip(cams, batch.labels, batch.masks, strict=True):
        shown = resized(cam[labels.nonzero()[:, 0]], mask.shape).numpy()
        counter.update(shown, mask, present_ids(labels, background))


def resized(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes maps (K,h,w) to a mask and min-max normalises each of them, as the reference method does."""
    if len(cam) == 0:
        return cam.new_zeros(0, *size)
    return normalize_cam(F.interpolate(cam[None], tuple(size), mode="bilinear", align_corners=False), "minmax")[0]


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur."""
    occurs = labels.any(dim=0)
    return float(average_precision_score(labels[:, occurs].numpy(), logits[:, occurs].numpy(), average="macro"))
