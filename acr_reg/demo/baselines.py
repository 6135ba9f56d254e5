"""Baselines that use no network. Class maps that score below them have found nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acr_reg.metrics import CamMeanIoU, CamScores

Sample = tuple[NDArray[np.integer], Sequence[int]]  # a mask (H,W) and the ids of the classes present

_PRIOR_SIZE = 32  # pixels, the side of the location prior


def all_background(samples: Iterable[Sample], num_classes: int) -> CamScores:
    """Predicts background, id 0, at every pixel."""
    counter = CamMeanIoU(num_classes)
    for mask, _ in samples:
        counter.update(np.zeros((0, *mask.shape)), mask, [])
    return counter.compute()


def centred_ellipse(samples: Iterable[Sample], num_classes: int, frequency: Sequence[int]) -> CamScores:
    """Predicts a centred ellipse with the image's proportions, filled with one of the image's labels.

    That is the label that is rarest by `frequency` (how often each id labels a training image). Of the rules tried
    (rarest, commonest, lowest id, side by side) this one was the best on VOC animals. The map falls from 1 at the
    centre to 0 in the corners, so the threshold sets the size of the ellipse: 1 - radius / sqrt(2).
    """
    counter = CamMeanIoU(num_classes)
    for mask, present in samples:
        chosen = sorted(present, key=lambda label: frequency[label])[:1]
        counter.update(ellipse(*mask.shape)[None][: len(chosen)], mask, chosen)
    return counter.compute()


def ellipse(height: int, width: int) -> NDArray[np.floating]:
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return 1 - np.hypot(y[:, None], x[None, :]) / np.sqrt(2)


def largest_class(samples: Iterable[Sample], num_classes: int, train: Iterable[Sample]) -> CamScores:
    """Fills the image with the present class that covers most pixels of the training masks. For no background."""
    area = np.zeros(num_classes)
    for mask, _ in train:
        area += np.bincount(mask[mask != 255], minlength=num_classes)
    counter = CamMeanIoU(num_classes, background=False)
    for mask, present in samples:
        chosen = max(present, key=lambda label: area[label])
        counter.update(np.ones((1, *mask.shape)), mask, [chosen])
    return counter.compute()


def location_prior(samples: Iterable[Sample], num_classes: int, train: Iterable[Sample]) -> CamScores:
    """Gives each pixel the present class that is most frequent there in the training masks. For no background."""
    prior = np.zeros((num_classes, _PRIOR_SIZE, _PRIOR_SIZE), np.float32)
    for mask, _ in train:
        small = Image.fromarray(mask.astype(np.uint8)).resize((_PRIOR_SIZE, _PRIOR_SIZE), Image.Resampling.NEAREST)
        prior += np.asarray(small) == np.arange(num_classes)[:, None, None]
    counter = CamMeanIoU(num_classes, background=False)
    for mask, present in samples:
        size = mask.shape[::-1]
        maps = [Image.fromarray(values).resize(size, Image.Resampling.BILINEAR) for values in prior[list(present)]]
        counter.update(np.stack([np.asarray(values) for values in maps]), mask, list(present))
    return counter.compute()
