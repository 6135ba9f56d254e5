"""Scores segmentations by mIoU: class maps at every background threshold, in one pass over the pixels, and label maps.

Class maps are scored as segmentation seeds: a pixel takes the class of the highest map, or background (id 0) if no map
exceeds a threshold, and a sweep finds the best threshold. Instead of an argmax and a confusion matrix per threshold,
every pixel is counted once, by the number of thresholds that its highest value exceeds. Cumulative sums of these
histograms give the counts at all thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CamCounts", "CamMeanIoU", "CamScores", "LabelMeanIoU", "LabelScores"]

FloatArray = npt.NDArray[np.floating]
ROUNDING = 1e-5  # normalised or resized maps may leave [0, 1] by this
PIXELS_AT_ONCE = 2**14  # temporary arrays stay in the cache, and in memory that the process has already
EVEN = 0.01  # how far thresholds may be from evenly spaced ones, in steps
SMALLEST_STEP = 1e-4  # between thresholds whose nearest is computed: float32 is 1000 times finer


@dataclass(frozen=True, eq=False)
class CamCounts:
    """Counts of pixels, from which scores are computed. Counts of images add up, so a bootstrap can resample images.

    Attributes:
        predicted: (C, T) pixels given to each class at each threshold; (C, 1) without a background class.
        correct: (C, T) the correct ones among these pixels.
        truth: (C,) pixels of each class in the masks.
    """

    predicted: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CamScores:
    """Scores of one data set. IoU and mIoU lie in [0, 1]; T thresholds, C classes (background included).

    Attributes:
        thresholds: (T,) background thresholds, ascending; (0,) without a background class.
        miou: (T,) mIoU at each threshold; (1,) without a background class.
        best_threshold: the lowest threshold of the highest mIoU; None without a background class.
        best_miou: mIoU at that threshold.
        per_class_iou: (C,) IoU at that threshold; NaN for a class neither in the masks nor predicted.
        false_positive_rate: (C,) pixels wrongly given to the class, over its union, at that threshold.
        false_negative_rate: (C,) missed pixels of the class, over its union. IoU and the two rates sum to 1.
    """

    thresholds: FloatArray
    miou: FloatArray
    best_threshold: float | None
    best_miou: float
    per_class_iou: FloatArray
    false_positive_rate: FloatArray
    false_negative_rate: FloatArray

    def __repr__(self) -> str:
        at = "" if self.best_threshold is None else f", best_threshold={self.best_threshold:g}"
        scored = int(np.isfinite(self.per_class_iou).sum())
        return f"CamScores(best_miou={self.best_miou:.4f}{at}, over {scored} of {self.per_class_iou.size} classes)"


class CamMeanIoU:
    """Counts class maps against masks, image by image, and computes mIoU for all background thresholds.

    With background, id 0 is background and the maps have ids 1 .. num_classes - 1. At threshold t a pixel is background
    if its highest map value is <= t, else it takes the class of the highest map: the argmax over [t, map 1, map 2, ...]
    with ties to the first. Values and thresholds are compared in the precision of the maps (at least float32), as in
    scripts that put both in one array. Without background, ids are 0 .. num_classes - 1 and a pixel takes the class of
    the highest map given: one result, no threshold.

    IoU counts pixels over the whole data set. mIoU is the mean over the classes whose union (in the masks or predicted,
    at that threshold) is not empty; other classes are NaN. Counters with equal settings add up: ``a + b``.

    Args:
        num_classes: number of ids, background included if there is one (21 for VOC, 81 for COCO).
        thresholds: ascending values in [0, 1]; default 0, 0.01, ..., 0.99. Unused without background.
        background: whether id 0 is background.
        ignore_index: mask value of pixels that are not counted, even if a class has this id. None counts every pixel.

    Raises:
        ValueError: fewer than 2 ids with background or 1 without, or thresholds not ascending within [0, 1].

    Example: two rows of two pixels, one map of class 1, right for thresholds from 0.2 to below 0.6.

    >>> import numpy as np
    >>> metric = CamMeanIoU(num_classes=2)
    >>> metric.update(cam=np.array([[[0.9, 0.2], [0.6, 0.0]]]), mask=np.array([[1, 0], [1, 255]]), classes=[1])
    >>> scores = metric.compute()
    >>> scores.best_threshold, scores.best_miou
    (0.2, 1.0)
    """

    def __init__(
        self,
        num_classes: int,
        thresholds: Sequence[float] | FloatArray | None = None,
        background: bool = True,
        ignore_index: int | None = 255,
    ) -> None:
        if num_classes < (smallest := 2 if background else 1):
            raise ValueError(f"num_classes is {num_classes}. With background={background} pass at least {smallest}.")
        if not background:
            thresholds = []
        values = np.asarray(np.arange(100) / 100 if thresholds is None else thresholds, dtype=np.float64)
        ascending = values.ndim == 1 and bool((np.diff(values) > 0).all())
        if not ascending or not bool(((values >= 0) & (values <= 1)).all()) or (background and values.size == 0):
            raise ValueError(f"thresholds are {values}. Pass ascending values in [0, 1], each once.")
        self.num_classes = num_classes
        self.thresholds = values
        self.background = background
        self.ignore_index = ignore_index
        self._step = _even_step(values)
        # Row: class. Column: the number of thresholds that the highest map value of the pixel exceeds.
        self._predicted = np.zeros((num_classes, values.size + 1), dtype=np.int64)  # by class of the highest map
        self._correct = np.zeros_like(self._predicted)  # by class of the mask, where it can be predicted
        self._truth = np.zeros(num_classes, dtype=np.int64)

    def update(self, cam: npt.ArrayLike, mask: npt.ArrayLike, classes: Sequence[int] | None = None) -> None:
        """Counts one image. An error counts nothing.

        Args:
            cam: (K, H, W) maps of K classes; in [0, 1] with background, any finite values without. A tensor may be on
                a GPU or carry a graph.
            mask: (H, W) integer ids of the truth, ignore_index where unknown.
            classes: ids of the K maps; other classes are never predicted. Default: all ids in order, without
                background. K = 0 is an image without classes: all background.

        Raises:
            ValueError: shapes that disagree (resize the maps first), NaN or values outside [0, 1], ids out of range,
                repeated classes, or no map without background.
        """
        maps, truth = as_array(cam), as_array(mask)
        if maps.ndim != 3 or truth.ndim != 2:
            raise ValueError(
                f"cam has shape {maps.shape} and mask {truth.shape}. Pass (K, H, W), one map per class, and (H, W)."
            )
        if maps.shape[1:] != truth.shape:
            raise ValueError(
                f"cam is {maps.shape[1]} x {maps.shape[2]} and mask {truth.shape[0]} x {truth.shape[1]}. Resize the "
                "maps to the mask."
            )
        self._check_values(maps)
        ids = self._checked_classes(classes, len(maps))
        truth = _codes("mask", truth, self.num_classes, self.ignore_index).ravel()

        order = np.argsort(ids)  # the lowest id wins a tie, whatever the order of the maps
        ids, flat = ids[order], [maps[position].ravel() for position in order]
        counts = np.zeros((4, *self._predicted.shape), dtype=np.int64)
        at_once = max(PIXELS_AT_ONCE, counts.size)
        for start in range(0, truth.size, at_once):
            part = slice(start, start + at_once)
            counts += self._verdicts([values[part] for values in flat], ids, truth[part])
        self._predicted += counts[:3].sum(axis=0)
        self._correct += counts[1]
        self._correct[0] += counts[2].sum(axis=0)
        self._truth += np.bincount(truth, minlength=self.num_classes + 1)[: self.num_classes]

    def compute(self) -> CamScores:
        """Scores of all images counted so far.

        Raises:
            ValueError: no pixel was counted.
        """
        if self._truth.sum() == 0:
            raise ValueError("No pixel was counted. Call update() with a mask that is not all ignore_index.")
        counts = self.counts()
        predicted, correct = counts.predicted, counts.correct
        iou, wrong, missed = _shares_of_union(predicted, correct, self._truth[:, None])
        miou = _mean_over_classes(iou)
        best = int(miou.argmax())
        return CamScores(
            thresholds=self.thresholds.copy(),
            miou=miou,
            best_threshold=float(self.thresholds[best]) if self.background else None,
            best_miou=float(miou[best]),
            per_class_iou=iou[:, best],
            false_positive_rate=wrong[:, best],
            false_negative_rate=missed[:, best],
        )

    def __add__(self, other: CamMeanIoU) -> CamMeanIoU:
        """The counter of both data sets together. Raises ValueError if their settings differ."""
        if not isinstance(other, CamMeanIoU):
            return NotImplemented
        if self._settings() != other._settings():
            raise ValueError(f"The settings are {self._settings()} and {other._settings()}. Make both counters alike.")
        total = self.empty()
        total._predicted = self._predicted + other._predicted
        total._correct = self._correct + other._correct
        total._truth = self._truth + other._truth
        return total

    def empty(self) -> CamMeanIoU:
        """A counter with the same settings that has counted nothing."""
        return CamMeanIoU(self.num_classes, self.thresholds, self.background, self.ignore_index)

    def counts(self) -> CamCounts:
        """Pixels predicted as each class, the correct ones among them, and pixels in the masks, over all images."""
        if not self.background:
            return CamCounts(self._predicted.copy(), self._correct.copy(), self._truth.copy())
        # A pixel belongs to a class at threshold j if its value exceeds more than j thresholds (columns j + 1 on),
        # and to background otherwise (columns 0 .. j).
        predicted = self._predicted[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        correct = self._correct[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        predicted[0] = self._predicted.sum(axis=0).cumsum()[:-1]
        correct[0] = self._correct[0].cumsum()[:-1]
        return CamCounts(predicted, correct, self._truth.copy())

    def _verdicts(
        self,
        maps: Sequence[npt.NDArray[np.generic]],
        ids: npt.NDArray[np.int64],
        truth: npt.NDArray[np.unsignedinteger],
    ) -> npt.NDArray[np.int64]:
        """Pixels by verdict (0 wrong, 1 right, 2 background in the mask, 3 ignored), class and thresholds exceeded.

        By arithmetic, because masked assignments take many times longer on noisy maps."""
        highest, best = self._highest(maps, ids, truth.size)
        verdict = (best == truth).view(np.uint8)
        if self.background:  # right where the threshold is high enough, whatever the highest map
            np.maximum(verdict, (truth == 0).view(np.uint8) << 1, out=verdict)
        np.maximum(verdict, (truth == self.num_classes).view(np.uint8) * np.uint8(3), out=verdict)
        shape = (4, *self._predicted.shape)
        rows = np.multiply(verdict, shape[1], dtype=np.uint32)
        rows += best
        index = np.multiply(rows, shape[2], dtype=np.int64)
        if self.background:
            index += self._exceeded(highest)
        return np.bincount(index, minlength=math.prod(shape)).reshape(shape)

    def _highest(
        self, maps: Sequence[npt.NDArray[np.generic]], ids: npt.NDArray[np.int64], size: int
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.unsignedinteger]]:
        """The highest value of each pixel, in the precision of the maps, and the class of its map."""
        small = np.min_scalar_type(self.num_classes)
        if not maps:
            return np.zeros(size, np.float32), np.zeros(size, small)
        precision = np.result_type(maps[0].dtype, np.float32)
        highest, best = maps[0].astype(precision), np.full(size, ids[0], small)
        for number, map_of_class in zip(ids[1:].astype(small), maps[1:], strict=True):
            values = map_of_class.astype(precision, copy=False)
            best ^= (best ^ number) * (values > highest)  # the number where it is higher
            np.maximum(highest, values, out=highest)
        return highest, best

    def _exceeded(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
        """The number of thresholds that each value exceeds."""
        thresholds = self.thresholds.astype(values.dtype)
        if self._step is None:
            return np.searchsorted(thresholds, values, side="left")
        # The threshold nearest to the value is computed, and the value compared with it: rounding cannot matter, as
        # the thresholds below the nearest are exceeded and those above are not.
        position = values * (1 / self._step)
        position += 0.5 - self.thresholds[0] / self._step
        nearest = np.clip(position, 0, thresholds.size, out=position).astype(np.intp)
        nearest += values > np.append(thresholds, np.inf).astype(values.dtype)[nearest]
        return nearest

    def _check_values(self, maps: npt.NDArray[np.generic]) -> None:
        if maps.dtype.kind not in "fiub":
            raise ValueError(f"cam has dtype {maps.dtype}. Convert the maps to float.")
        if maps.size == 0:
            return
        low, high = float(maps.min()), float(maps.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("cam has NaN or infinite values. Check how it is normalised: 0 / 0 in an empty map?")
        if self.background and (low < -ROUNDING or high > 1 + ROUNDING):
            raise ValueError(
                f"cam has values from {low:.4g} to {high:.4g}. Normalise each map to [0, 1], as normalize_cam does."
            )

    def _checked_classes(self, classes: Sequence[int] | None, count: int) -> npt.NDArray[np.int64]:
        first = 1 if self.background else 0
        valid = f"ids {first} to {self.num_classes - 1}" + (" (0 is background)" if self.background else "")
        ids = np.arange(first, self.num_classes) if classes is None else np.asarray(classes)
        if ids.shape != (count,):
            if classes is not None:
                raise ValueError(f"cam has {count} maps for {ids.size} classes. Pass one id for each map in classes=.")
            counts = f"num_classes={self.num_classes}{' counts background' if self.background else ''}"
            raise ValueError(
                f"cam has {count} maps for {ids.size} classes: {counts}. Correct it, or pass one id for each map in "
                "classes=."
            )
        if count == 0 and not self.background:
            raise ValueError("cam has no map. Without background, pass at least one.")
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"classes have dtype {ids.dtype}. Pass whole numbers: {valid}.")
        if ids.min() < first or ids.max() >= self.num_classes:
            raise ValueError(f"classes are {ids.tolist()}. Pass {valid}.")
        if len(np.unique(ids)) != count:
            raise ValueError(f"classes are {ids.tolist()}. Pass each class once; merge or drop the repeated maps.")
        return ids.astype(np.int64)

    def _settings(self) -> tuple[int, tuple[float, ...], bool, int | None]:
        return self.num_classes, tuple(self.thresholds.tolist()), self.background, self.ignore_index


@dataclass(frozen=True, eq=False)
class LabelScores:
    """Scores of the label maps of one data set, in [0, 1]; C classes.

    Attributes:
        miou: mean IoU over the classes that are in the masks or predicted.
        per_class_iou: (C,) NaN for a class neither in the masks nor predicted.
        false_positive_rate: (C,) pixels wrongly given to the class, over its union.
        false_negative_rate: (C,) missed pixels of the class, over its union. IoU and the two rates sum to 1.
        pixel_accuracy: correct pixels over all pixels of the masks.
        per_class_accuracy: (C,) correct pixels of a class over its pixels in the masks; NaN where it has none.
        class_accuracy: mean of the per-class accuracy over the classes in the masks.
    """

    miou: float
    per_class_iou: FloatArray
    false_positive_rate: FloatArray
    false_negative_rate: FloatArray
    pixel_accuracy: float
    per_class_accuracy: FloatArray
    class_accuracy: float


class LabelMeanIoU:
    """Counts label maps against masks, image by image: one confusion matrix of a whole data set.

    For predictions that are class ids: pseudo labels after a CRF or a random walk, or the output of a segmentation
    network. Pixels that the mask ignores are not counted. Pixels predicted as ``ignore_index`` where the mask has a
    class are missed pixels of that class: skipping them would raise the score of labels that leave difficult pixels
    out. Counters with equal settings add up: ``a + b``.

    Args:
        num_classes: number of ids, background included if there is one (21 for VOC, 81 for COCO).
        ignore_index: the id of pixels without a class, even if it is less than num_classes. None: there is no such id.

    Raises:
        ValueError: num_classes is less than 1.

    Example: of three labelled pixels one is right, one is wrong and one has no prediction.

    >>> import numpy as np
    >>> metric = LabelMeanIoU(num_classes=2)
    >>> metric.update(labels=np.array([[1, 1, 255, 0]]), mask=np.array([[1, 0, 1, 255]]))
    >>> metric.confusion()
    array([[0, 1, 0],
           [0, 1, 1]])
    >>> scores = metric.compute()
    >>> scores.per_class_iou.round(2), round(scores.pixel_accuracy, 2)
    (array([0.  , 0.33]), 0.33)
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}. Pass at least 1.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    def update(self, labels: npt.ArrayLike, mask: npt.ArrayLike) -> None:
        """Counts one image. An error counts nothing.

        Args:
            labels: (H, W) predicted integer ids, ignore_index where nothing is predicted.
            mask: (H, W) integer ids of the truth, ignore_index where unknown.

        Raises:
            ValueError: shapes that disagree, other dtypes, or ids out of range.
        """
        predicted, truth = as_array(labels), as_array(mask)
        if predicted.ndim != 2 or predicted.shape != truth.shape:
            raise ValueError(f"labels have shape {predicted.shape} and mask {truth.shape}. Pass (H, W), of one size.")
        column = _codes("labels", predicted, self.num_classes, self.ignore_index)
        row = _codes("mask", truth, self.num_classes, self.ignore_index)
        size = self.num_classes + 1
        pairs = np.multiply(row, size, dtype=np.int64)
        pairs += column
        self._confusion += np.bincount(pairs.ravel(), minlength=size**2).reshape(size, size)[: self.num_classes]

    def compute(self) -> LabelScores:
        """Scores of all images counted so far.

        Raises:
            ValueError: no pixel was counted.
        """
        if not self._confusion.any():
            raise ValueError("No pixel was counted. Call update() with a mask that is not all ignore_index.")
        correct, truth = self._confusion.diagonal(), self._confusion.sum(axis=1)
        predicted = self._confusion[:, :-1].sum(axis=0)
        iou, wrong, missed = _shares_of_union(predicted, correct, truth)
        with np.errstate(invalid="ignore"):  # 0 / 0: a class that no mask has
            accuracy = correct / truth
        return LabelScores(
            miou=float(_mean_over_classes(iou)),
            per_class_iou=iou,
            false_positive_rate=wrong,
            false_negative_rate=missed,
            pixel_accuracy=float(correct.sum() / truth.sum()),
            per_class_accuracy=accuracy,
            class_accuracy=float(np.nanmean(accuracy)),
        )

    def confusion(self) -> npt.NDArray[np.int64]:
        """(C, C + 1) pixels: row = id in the mask, column = predicted id; last column: predicted as ignore_index."""
        return self._confusion.copy()

    def empty(self) -> LabelMeanIoU:
        """A counter with the same settings that has counted nothing."""
        return LabelMeanIoU(self.num_classes, self.ignore_index)

    def __add__(self, other: LabelMeanIoU) -> LabelMeanIoU:
        """The counter of both data sets together. Raises ValueError if their settings differ."""
        if not isinstance(other, LabelMeanIoU):
            return NotImplemented
        settings = [(each.num_classes, each.ignore_index) for each in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(f"The settings are {settings[0]} and {settings[1]}. Make both counters alike.")
        total = self.empty()
        total._confusion = self._confusion + other._confusion
        return total


def _even_step(thresholds: npt.NDArray[np.float64]) -> float | None:
    """The step between evenly spaced thresholds, if it is large beside rounding in single precision; else None."""
    if thresholds.size < 2:
        return None
    step = float(thresholds[-1] - thresholds[0]) / (thresholds.size - 1)
    even = np.abs(thresholds - thresholds[0] - step * np.arange(thresholds.size)).max() < EVEN * step
    return step if even and step > SMALLEST_STEP else None


def as_array(values: npt.ArrayLike | Tensor) -> npt.NDArray[np.generic]:
    """As an array: a tensor may lie on a GPU, carry a graph or hold bfloat16, none of which numpy reads."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    tensor = values.detach().cpu()
    return np.asarray(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)


def _codes(
    name: str, ids: npt.NDArray[np.generic], num_classes: int, ignore_index: int | None
) -> npt.NDArray[np.unsignedinteger]:
    """The ids in few bytes, with num_classes for the ignored one. Raises ValueError for ids out of range."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} of dtype {ids.dtype} cannot hold ids. Pass class ids as whole numbers, not colours.")
    ignored = np.zeros(ids.shape, bool) if ignore_index is None else ids == ignore_index
    known = np.where(ignored, 0, ids)  # 0 is a valid id
    if known.size and (known.min() < 0 or known.max() >= num_classes):
        wrong = [int(i) for i in np.unique(known) if not 0 <= i < num_classes]
        others = "" if ignore_index is None else f", or {ignore_index} (ignored)"
        raise ValueError(
            f"{name} with ids {wrong[:8]}: only 0 to {num_classes - 1}{others} can be counted. Check the number of "
            "classes and the ignored id."
        )
    codes = known.astype(np.min_scalar_type(num_classes))
    codes += np.multiply(ignored, num_classes, dtype=codes.dtype)
    return codes


def _shares_of_union(
    predicted: npt.NDArray[np.int64], correct: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """IoU, wrong and missed pixels of each class, over its union; NaN for a class that is nowhere."""
    union = predicted + truth - correct
    with np.errstate(invalid="ignore"):  # 0 / 0
        return correct / union, (predicted - correct) / union, (truth - correct) / union


def _mean_over_classes(iou: FloatArray) -> FloatArray:
    """The mean over the first axis without NaN. It adds in one order for any shape, unlike numpy's mean, so that equal
    IoUs of labels and of maps have equal means, to the bit."""
    return np.nancumsum(iou, axis=0)[-1] / np.isfinite(iou).sum(axis=0)
