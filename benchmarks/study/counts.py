"""Every image's pixel counts at one threshold: few enough to be kept, enough for the mIoU of any resample of images."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """(images, C) int64: pixels predicted as each class, rightly so, and of the class in the mask."""

    predicted: NDArray[np.int64]
    correct: NDArray[np.int64]
    truth: NDArray[np.int64]

    def miou(self, weights: NDArray[np.integer] | None = None) -> float:
        """The mean over the classes that occur. ``weights`` (images,): how often each image counts, by default once."""
        ones = np.ones(len(self.truth), np.int64) if weights is None else weights
        return float(self._mious(ones[None])[0])

    def _mious(self, weights: NDArray[np.integer]) -> NDArray[np.floating]:
        """(R, images) -> (R,)"""
        predicted, correct, truth = (weights @ part for part in (self.predicted, self.correct, self.truth))
        union = predicted + truth - correct
        with np.errstate(invalid="ignore"):  # 0 / 0: a class that is nowhere in a resample
            return np.nanmean(np.where(union > 0, correct / union, np.nan), axis=1)

    def pack(self) -> str:
        """Most entries are 0, so it compresses well: about 5 KB for 118 images of 23 classes."""
        stacked = np.stack([self.predicted, self.correct, self.truth]).astype("<i4")
        shape = ",".join(map(str, stacked.shape[1:]))
        return f"{shape}:{base64.b64encode(zlib.compress(stacked.tobytes(), 9)).decode()}"

    @classmethod
    def unpack(cls, packed: str) -> ImageCounts:
        shape, _, content = packed.partition(":")
        images, classes = map(int, shape.split(","))
        flat = np.frombuffer(zlib.decompress(base64.b64decode(content)), "<i4").astype(np.int64)
        return cls(*flat.reshape(3, images, classes))


@dataclass(frozen=True)
class Difference:
    """Of two conditions' mIoU on the same images: the second less the first, and what resampling the images makes of
    it: the central 95 %."""

    value: float
    low: float
    high: float


def paired_bootstrap(first: ImageCounts, second: ImageCounts, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Each resample draws images with replacement, the same for both."""
    images = len(first.truth)
    if first.truth.shape != second.truth.shape or not np.array_equal(first.truth, second.truth):
        raise ValueError(
            f"found counts of {first.truth.shape} and {second.truth.shape} whose masks differ; expected the same "
            "images in the same order; pair two cells of one set, split and seed"
        )
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    differences = second._mious(weights) - first._mious(weights)
    low, high = np.quantile(differences, [0.025, 0.975])
    return Difference(second.miou() - first.miou(), float(low), float(high))


def multi_label(labels: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(images,) 1 where an image has two labels or more."""
    return np.array([len(present) > 1 for present in labels], np.int64)
