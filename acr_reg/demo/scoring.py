"""Scores a trained model: its classification, its raw and propagated class maps, its attention across two views."""

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
    class_token_gradient_cam,
    multi_view_cam,
    normalize_cam,
    propagate_cam,
)
from acr_reg.metrics import CamMeanIoU, CamScores

Predict = Callable[[Tensor], tuple[Tensor, AttentionMaps]]


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
class Scores:
    """`mean_ap` is the mean average precision. `terms` holds the distance per row between the attention of the two
    views, and the entropy of the attention."""

    mean_ap: float
    raw: CamScores
    propagated: CamScores
    terms: dict[str, float]


@dataclass(frozen=True)
class Maps:
    """How class maps are made and counted: of the layers from `start_layer` on, with a `background` (id 0) or none."""

    start_layer: int
    background: bool = True


def score(predict: Predict, batches: Iterable[Truth], maps: Maps, advance: Callable[[], None] = lambda: None) -> Scores:
    """`predict` returns logits and attention of images, on one graph. `advance` is called after each batch."""
    measure = AllPairsConsistencyLoss(HorizontalFlip())
    logits, labels, terms, sizes = [], [], [], []
    counters: list[CamMeanIoU] = []
    for batch in batches:
        cams, runs = class_maps(predict, batch.images, batch.labels, maps)
        classes = batch.labels.shape[1]
        counters = counters or [CamMeanIoU(classes + maps.background, background=maps.background) for _ in range(2)]
        for counter, cam in zip(counters, cams, strict=True):
            count(counter, cam, batch, maps)
        with torch.no_grad():
            _, found = measure(runs[0][1].detach(), runs[1][1].detach(), return_terms=True)
        logits.append(runs[0][0].detach())
        labels.append(batch.labels)
        terms.append({name: term.item() for name, term in found.items()})
        sizes.append(len(batch.images))
        advance()
    raw, propagated = (counter.compute() for counter in counters)
    means = {name: float(np.average([t[name] for t in terms], weights=sizes)) for name in terms[0]}
    return Scores(mean_average_precision(torch.cat(logits), torch.cat(labels)), raw, propagated, means)


def class_maps(
    predict: Predict, images: Tensor, labels: Tensor, maps: Maps
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, AttentionMaps]]]:
    """Raw and propagated class maps (B,C,h,w), each summed over the image and its flip.

    Also returns logits and attention of the image and of the flip.
    """
    runs = []

    def both(view: Tensor) -> Tensor:
        logits, attention = predict(view)
        runs.append((logits, attention))
        cam = class_token_gradient_cam(logits, attention, labels, maps.start_layer)
        with torch.no_grad():
            return torch.cat([cam, propagate_cam(cam, attention)], dim=1)

    raw, propagated = multi_view_cam(both, images, [Identity(), HorizontalFlip()]).chunk(2, dim=1)
    return (raw, propagated), runs


def count(counter: CamMeanIoU, cams: Tensor, batch: Truth, maps: Maps) -> None:
    for cam, labels, mask in zip(cams, batch.labels, batch.masks, strict=True):
        shown = resized(cam[labels.nonzero()[:, 0]], mask.shape).numpy()
        counter.update(shown, mask, present_ids(labels, maps.background))


def resized(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes maps (K,h,w) to a mask and min-max normalises each of them, as the reference method does."""
    if len(cam) == 0:
        return cam.new_zeros(0, *size)
    return normalize_cam(F.interpolate(cam[None], tuple(size), mode="bilinear", align_corners=False), "minmax")[0]


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur."""
    occurs = labels.any(dim=0)
    return float(average_precision_score(labels[:, occurs].numpy(), logits[:, occurs].numpy(), average="macro"))
