"""Scores a trained cell on a split: classification, class maps of every reading, entropy of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acr_reg import (
    AttentionCapture,
    AttentionMaps,
    HorizontalFlip,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from acr_reg.demo.photos.pretrained import UpperHalf
from acr_reg.demo.scoring import mean_average_precision, resized
from acr_reg.demo.train import with_grid
from acr_reg.metrics import CamMeanIoU, CamScores
from benchmarks.study.counts import ImageCounts, multi_label
from benchmarks.study.objective import entropies
from benchmarks.study.photos import Photos
from benchmarks.study.settings import PROPAGATIONS, READINGS, Reading

_AT_ONCE = 32
RAW = "raw"

Key = tuple[int, str]  # start layer; how it was propagated, or RAW


@dataclass(frozen=True)
class Scored:
    """The scores of a split. ``images``: a counter for each image, by the requested reading; ``totals``: by all
    readings."""

    mean_ap: float
    totals: dict[Key, CamMeanIoU]
    images: dict[Key, list[CamMeanIoU]]
    entropies: list[list[float]]


def score(
    photos: Photos,
    model: UpperHalf,
    split: str,
    reading: Reading,
    every_reading: bool,
    advance: Callable[[], None] = lambda: None,
) -> Scored:
    """Score class maps of the photos and their flips from cached tokens; the frozen blocks do not run.
    ``every_reading`` scores all readings, at the cost of a backward pass for each start layer. The model is left in
    eval mode, with parameters that take no gradient."""
    readings = READINGS if every_reading else (reading,)
    tokens, labels, masks = photos.tokens(split), photos.labels(split), photos.masks(split)
    first = int(photos.folder.background)
    totals: dict[Key, CamMeanIoU] = {}
    kept: dict[Key, dict[int, CamMeanIoU]] = {(reading.start, RAW): {}, (reading.start, reading.propagation): {}}
    logits = torch.zeros_like(labels)
    entropy, sizes = [], []
    # A batch takes as many backward passes as its photo with most labels has, so photos with equally many go together.
    order = labels.sum(1).argsort(stable=True)
    model = model.eval().requires_grad_(False)
    with capture_attention(model, graph_from=len(model.blocks) + min(each.start for each in readings)) as attention:
        for part in order.split(_AT_ONCE):
            batch = torch.from_numpy(np.array(tokens[:, part.numpy()])).float()
            cams, found, maps = class_maps(model, attention, batch, labels[part], photos.grid, readings)
            logits[part] = found
            entropy.append(maps)
            sizes.append(len(part))
            for position, image in enumerate(part.tolist()):
                present = labels[image].nonzero()[:, 0]
                for key, cam in cams.items():
                    counter = CamMeanIoU(photos.classes + first, background=bool(first))
                    small = cam[position, present]
                    counter.update(resized(small, masks[image].shape).numpy(), masks[image], (present + first).tolist())
                    totals[key] = totals[key] + counter if key in totals else counter
                    if key in kept:
                        kept[key][image] = counter
            advance()
    weights = torch.tensor(sizes, dtype=torch.float32) / sum(sizes)
    mean_entropy = (torch.stack(entropy) * weights[:, None, None]).sum(0)
    images = {key: [counters[image] for image in range(len(labels))] for key, counters in kept.items()}
    return Scored(mean_average_precision(logits, labels), totals, images, mean_entropy.tolist())


def class_maps(
    model: UpperHalf,
    attention: AttentionCapture,
    tokens: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    readings: Sequence[Reading],
) -> tuple[dict[Key, Tensor], Tensor, Tensor]:
    """Class maps (B,C,h,w) of each reading, summed over photo and flip; the photos' logits; the entropies of both
    views. ``tokens`` (2,B,1+N,D) are those of the photos and of their flips."""
    back = HorizontalFlip().inverse
    merged: dict[Key, Tensor] = {}
    runs: list[tuple[Tensor, AttentionMaps]] = []
    for view, inputs in enumerate(tokens):
        logits = model(inputs)
        maps = with_grid(attention.take(), grid)
        runs.append((logits.detach(), maps.detach()))
        raws: dict[int, Tensor] = {}
        for reading in readings:
            if reading.start not in raws:
                raws[reading.start] = class_token_gradient_cam(logits, maps, labels, reading.start)
                _add(merged, (reading.start, RAW), raws[reading.start], back if view else None)
            with torch.no_grad():
                spread = propagate_cam(raws[reading.start], maps, PROPAGATIONS[reading.propagation])
            _add(merged, (reading.start, reading.propagation), spread, back if view else None)
    with torch.no_grad():
        found = torch.stack([entropies(maps) for _, maps in runs]).mean(0)
    return merged, runs[0][0], found


def _add(merged: dict[Key, Tensor], key: Key, cam: Tensor, back: Callable[[Tensor], Tensor] | None) -> None:
    cam = cam if back is None else back(cam)
    merged[key] = merged[key] + cam if key in merged else cam


# ------------------------------------------------------------ figures


@dataclass(frozen=True)
class MapFigures:
    """Scores of one kind of class maps. ``threshold``, the best one on dev, gives ``miou``, the rates (pixels over the
    union, averaged over classes) and the counts; ``oracle`` is the split's own best. Thresholds are None in a set
    without a background. ``multi_label`` is the mIoU of the photos with two labels or more."""

    miou: float
    threshold: float | None
    oracle: float
    oracle_threshold: float | None
    curve: list[float]
    per_class_iou: list[float | None]
    false_positive: float
    false_negative: float
    multi_label: float
    counts: str


def figures(
    total: CamMeanIoU, images: Sequence[CamMeanIoU], present: Sequence[Sequence[int]], threshold: float | None
) -> MapFigures:
    """``threshold`` None takes the best of these images: on dev, where it is chosen for the other splits."""
    scores: CamScores = total.compute()
    if not total.background:
        index = 0
    else:
        chosen = scores.best_threshold if threshold is None else threshold
        assert chosen is not None
        index = int(np.abs(scores.thresholds - chosen).argmin())
    counts = image_counts(images, index)
    predicted, correct, truth = (part.sum(0) for part in (counts.predicted, counts.correct, counts.truth))
    union = predicted + truth - correct
    occurs = union > 0
    first = int(total.background)
    iou, wrong, missed = (
        np.where(occurs, part / np.maximum(union, 1), np.nan)
        for part in (correct, predicted - correct, truth - correct)
    )
    return MapFigures(
        miou=counts.miou(),
        threshold=float(scores.thresholds[index]) if total.background else None,
        oracle=scores.best_miou,
        oracle_threshold=scores.best_threshold,
        curve=[round(float(value), 4) for value in scores.miou],
        per_class_iou=[None if np.isnan(value) else round(float(value), 4) for value in iou],
        false_positive=float(np.nanmean(wrong[first:])),
        false_negative=float(np.nanmean(missed[first:])),
        multi_label=counts.miou(multi_label(present)),
        counts=counts.pack(),
    )


def image_counts(images: Sequence[CamMeanIoU], index: int) -> ImageCounts:
    """The counts of every image at the threshold of that index."""
    found = [counter.counts() for counter in images]
    return ImageCounts(
        np.stack([each.predicted[:, index] for each in found]),
        np.stack([each.correct[:, index] for each in found]),
        np.stack([each.truth for each in found]),
    )
