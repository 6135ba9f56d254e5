"""Pseudo labels: which class each pixel takes from the class maps of its image, as the next stage trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acr_reg.integrations.formats.files import IGNORED, checked_maps
from acr_reg.integrations.formats.save import ROUNDING, check_alphas
from acr_reg.metrics import as_array


def pseudo_labels(
    cams: Mapping[int, npt.ArrayLike],
    threshold: float | None = None,
    *,
    ignore_between: tuple[float, float] | None = None,
    alphas: tuple[float, float] | None = None,
    background: bool = True,
    size: tuple[int, int] | None = None,
) -> npt.NDArray[np.uint8]:
    r"""Compute the id of every pixel: 0 for background, k + 1 for class k, 255 for pixels to ignore.

    At each pixel let m be the highest of the maps and k its class. Of maps that tie, the lowest class wins. One of
    three rules tells foreground from background.

    ``threshold=t``: scored as labels, they have exactly the score of the maps at this threshold
    (:class:`~acr_reg.metrics.CamMeanIoU`).

        id = 0 if m <= t, else k + 1

    ``ignore_between=(low, high)``, as ToCo, AFA and DuPL (``--low_thre``, ``--high_thre``) and IRN (``conf_bg_thres``,
    ``conf_fg_thres``, there before a CRF):

        id = 0 if m <= low, k + 1 if m > high, else 255

    ``alphas=(low, high)``, as PSA reads its two folders of CRF files (``psa_crf``), with a background b(a) = (1 - m)^a:

        id = 0 if m <= b(high), k + 1 if m > b(low), else 255

    Since b falls as m rises, two alphas mean two thresholds: 4 and 32 ignore the pixels from 0.08 to 0.28.

    With ``background=False`` there is no such rule, and id = k.

    Args:
        cams: 0-based class -> (H, W) map; in [0, 1] with background, any finite values without. Values and thresholds
            are compared in the maps' precision, at least float32.
        threshold: in [0, 1].
        ignore_between: 0 <= low < high <= 1.
        alphas: 0 < low < high. PSA uses 4 and 32, SEAM 4 and 24, MCTformer and ACR 1 and 12.
        background: whether id 0 is background.
        size: (H, W) of the image; needed only if there are no maps, and all is background.

    Returns:
        uint8 (H, W).

    Raises:
        ValueError: not exactly one rule with background, or any without; a rule out of range; an id above 254; maps of
            different sizes, with NaN or outside [0, 1]; no map and no ``size``, or no map without background.

    >>> import numpy as np
    >>> cams = {14: np.array([[0.1, 0.4, 0.9]]), 2: np.array([[0.2, 0.0, 0.9]])}
    >>> pseudo_labels(cams, 0.3).tolist()
    [[0, 15, 3]]
    >>> pseudo_labels(cams, ignore_between=(0.3, 0.6)).tolist()
    [[0, 255, 3]]
    """
    rule = LabelRule(threshold, ignore_between, alphas, background)
    numbers, maps = _by_class(cams, size, background)
    if not len(maps):
        return np.zeros(maps.shape[1:], np.uint8)
    highest = maps.max(axis=0)
    labels = (numbers + int(background)).astype(np.uint8)[maps.argmax(axis=0)]  # argmax takes the first of equals
    if background:
        low, high = rule.bounds(highest)
        labels[highest <= high] = IGNORED
        labels[highest <= low] = 0
    return labels


@dataclass(frozen=True)
class LabelRule:
    """What turns class maps into labels, checked: the arguments of :func:`pseudo_labels`."""

    threshold: float | None = None
    ignore_between: tuple[float, float] | None = None
    alphas: tuple[float, float] | None = None
    background: bool = True

    def __post_init__(self) -> None:
        rules = [name for name in ("threshold", "ignore_between", "alphas") if getattr(self, name) is not None]
        if self.background and len(rules) != 1:
            raise ValueError(
                f"{' and '.join(rules) or 'No rule'} given. Give exactly one of threshold, ignore_between and alphas, "
                "or background=False."
            )
        if not self.background and rules:
            raise ValueError(f"{' and '.join(rules)} given without background. Leave this out: the highest map wins.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} lies outside [0, 1]. Give a value of the maps.")
        if self.ignore_between is not None and not 0 <= self.ignore_between[0] < self.ignore_between[1] <= 1:
            raise ValueError(f"ignore_between={self.ignore_between} does not satisfy 0 <= low < high <= 1.")
        if self.alphas is not None:
            check_alphas(self.alphas)

    def __str__(self) -> str:
        """Equal for equal rules, whether the numbers are 4, 4.0 or numpy's."""
        for name in ("threshold", "ignore_between", "alphas"):
            if (value := getattr(self, name)) is not None:
                return f"{name}={np.asarray(value, float).tolist()}"
        return "background=False"

    def bounds(self, highest: npt.NDArray[np.floating]) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Background is at most the first, foreground above the second. In the precision of ``highest``."""
        if self.alphas is not None:
            rest = 1 - highest.clip(0, 1)
            low, high = map(float, self.alphas)  # numpy's float64 would leave the precision of the maps
            return rest**high, rest**low
        if self.ignore_between is not None:
            return highest.dtype.type(self.ignore_between[0]), highest.dtype.type(self.ignore_between[1])
        threshold = highest.dtype.type(self.threshold)
        return threshold, threshold


def _by_class(
    cams: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None, background: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
    """Ascending classes (K,) and their maps (K, H, W) in their own precision, at least float32."""
    numbers = sorted(checked_maps(cams))
    largest = IGNORED - 1 - int(background)
    if numbers and numbers[-1] > largest:
        raise ValueError(
            f"The maps have class {numbers[-1]}. Label images hold classes up to {largest}; id {IGNORED} means ignored."
        )
    if not numbers:
        if not background:
            raise ValueError("There is no map. Without background, each image needs one: leave this image out.")
        if size is None:
            raise ValueError(
                "There are no maps to take the size from. Pass size=(H, W), or images= (--images) to convert a folder."
            )
        return np.zeros(0, np.int64), np.zeros((0, *size), np.float32)
    maps = np.stack([as_array(cams[number]) for number in numbers])
    maps = maps.astype(np.result_type(maps.dtype, np.float32), copy=False)
    if size is not None and maps.shape[1:] != tuple(size):
        raise ValueError(f"The maps are {maps.shape[1:]} (H, W) and size={tuple(size)}. Resize the maps first.")
    if maps.size:
        lowest, highest = float(maps.min()), float(maps.max())
        if not np.isfinite([lowest, highest]).all():
            raise ValueError(
                "The maps have NaN or infinite values. Check how they are normalised: 0 / 0 in an empty map?"
            )
        if background and (lowest < -ROUNDING or highest > 1 + ROUNDING):
            raise ValueError(f"The maps have values from {lowest:.4g} to {highest:.4g}. Normalise each map to [0, 1].")
    return np.array(numbers), maps
