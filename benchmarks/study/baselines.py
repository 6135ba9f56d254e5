"""Answers without training: class maps that score less have found nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acr_reg import AttentionMaps, HorizontalFlip, capture_attention
from acr_reg.demo.baselines import Sample, all_background, centred_ellipse, largest_class, location_prior
from acr_reg.demo.scoring import resized
from acr_reg.demo.train import with_grid
from acr_reg.metrics import CamMeanIoU, CamScores
from benchmarks.study.photos import Photos

_AT_ONCE = 32
ATTENTION_LAYERS = (1, 3)  # how many of the last layers are averaged: the better one on dev is reported


def baselines(photos: Photos, split: str) -> list[dict[str, Any]]:
    """Name, mIoU and threshold of each. Dev chooses the size of the ellipse, the threshold and the layers."""
    classes = len(photos.folder.names)
    samples = {name: _samples(photos, name) for name in {"dev", split}}
    rows = []
    if photos.folder.background:
        frequency = [0, *photos.labels("train").sum(0).int().tolist()]
        rows.append(_row("all background", *[all_background(samples[name], classes) for name in (split, "dev")]))
        ellipses = [centred_ellipse(samples[name], classes, frequency) for name in (split, "dev")]
        rows.append(_row("best centred ellipse", *ellipses))
        order: Sequence[float] = frequency
    else:
        known = _samples(photos, "train")
        rows += [
            _row(name, *[answer(samples[each], classes, known) for each in (split, "dev")])
            for name, answer in (
                ("largest present class", largest_class),
                ("location prior of the training masks", location_prior),
            )
        ]
        order = _areas(known, classes)
    found = [_attention_rows(photos, split, samples, order, layers) for layers in ATTENTION_LAYERS]
    return [*rows, max(found, key=lambda row: row["dev_miou"])]


def _samples(photos: Photos, split: str) -> list[Sample]:
    return list(zip(photos.masks(split), photos.present(split), strict=True))


def _areas(samples: Sequence[Sample], classes: int) -> list[float]:
    area = np.zeros(classes)
    for mask, _ in samples:
        area += np.bincount(mask[mask != 255], minlength=classes)
    return area.tolist()


def _row(name: str, shown: CamScores, dev: CamScores) -> dict[str, Any]:
    index = int(np.argmax(dev.miou))
    return {"name": name, "miou": float(shown.miou[index]), "threshold": dev.best_threshold, "dev_miou": dev.best_miou}


def _attention_rows(
    photos: Photos, split: str, samples: dict[str, list[Sample]], order: Sequence[float], layers: int
) -> dict[str, Any]:
    """The class token's attention in the backbone as it comes, which knows no class. Above a threshold it stands for
    the rarest of the photo's labels (by `order`: how often, or how large in the training photos), below it for the
    background or, in a set without one, for the commonest label."""
    curves = {name: _attention_curve(photos, name, samples[name], order, layers) for name in {"dev", split}}
    index = int(np.argmax(curves["dev"]))
    return {
        "name": f"untrained backbone's attention, last {layers} layer{'s' if layers > 1 else ''}",
        "miou": float(curves[split][index]),
        "threshold": index / len(curves[split]),
        "dev_miou": float(curves["dev"][index]),
    }


def _attention_curve(
    photos: Photos, split: str, samples: Sequence[Sample], order: Sequence[float], layers: int
) -> np.ndarray:
    """(100,) mIoU at each threshold."""
    ids = len(photos.folder.names)
    background = photos.folder.background
    # Without a background the commonest label takes its place.
    thresholds = np.arange(100) / 100
    predicted, correct, truth = (np.zeros((100, ids)) for _ in range(3))
    if background:
        counter = CamMeanIoU(ids)
        for attention, (mask, present) in zip(attention_maps(photos, split, layers), samples, strict=True):
            chosen = sorted(present, key=lambda label: order[label])[:1]
            counter.update(resized(attention[None], mask.shape).numpy(), mask, chosen)
        return counter.compute().miou
    for attention, (mask, present) in zip(attention_maps(photos, split, layers), samples, strict=True):
        by_size = sorted(present, key=lambda label: order[label])
        counted = mask != 255
        values, seen = resized(attention[None], mask.shape).numpy()[0][counted], mask[counted].astype(np.int64)
        exceeded = np.searchsorted(thresholds, values, side="left")  # the number of thresholds below the value
        above = exceeded[None] > np.arange(100)[:, None]
        truth += np.bincount(seen, minlength=ids)
        for label, taken in ((by_size[0], above), (by_size[-1], ~above)):
            predicted[:, label] += taken.sum(1)
            correct[:, label] += (taken & (seen == label)).sum(1)
    union = predicted + truth - correct
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(union > 0, correct / union, np.nan), axis=1)


def attention_maps(photos: Photos, split: str, layers: int) -> list[Tensor]:
    """(h,w) for each photo: the class token's attention to patches, averaged over heads and the last layers, summed
    over photo and flip."""
    model = photos.upper(0).eval()
    tokens = photos.tokens(split)
    found: list[Tensor] = []
    with torch.no_grad(), capture_attention(model, no_grad=True) as capture:
        for part in torch.arange(tokens.shape[1]).split(_AT_ONCE):
            merged = torch.zeros(())
            for view, inputs in enumerate(torch.from_numpy(np.array(tokens[:, part.numpy()])).float()):
                model(inputs)
                maps = _class_rows(with_grid(capture.take(), photos.grid), layers).unflatten(-1, photos.grid)
                merged = merged + (HorizontalFlip().inverse(maps) if view else maps)
            found += list(merged)
    return found


def _class_rows(maps: AttentionMaps, layers: int) -> Tensor:
    rows = [layer.weights(torch.tensor([0]))[:, :, 0, 1:].mean(1) for layer in maps[-layers:]]
    return torch.stack(rows).mean(0)
