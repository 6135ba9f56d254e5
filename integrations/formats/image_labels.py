"""Reads image labels, the classes present in each image, and finds an image in them by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from acr_reg.integrations.formats.files import kind_of

_VOC = re.compile(r"([0-9]{4})_([0-9]{6})")
_COCO = re.compile(r"(?:COCO_\w+_)?([0-9]{1,12})")


def labels_of(labels: Mapping[Any, npt.ArrayLike], name: str) -> npt.NDArray[Any]:
    """The labels (C,) of the image ``name``, a file name without its ending.

    ``labels`` may be keyed by the name or, as IRN's files are, by its number: 2007000032 for 2007_000032, and 139 for
    000000000139 or COCO_train2014_000000000139. COCO's names of 2014 and of 2017 stand for each other.

    Raises:
        KeyError: no key fits the name, or two fit and their labels differ.
        ValueError: the labels are not (C,) numbers, or hold NaN.
    """
    fitting = [key for key in _keys_of(name) if key in labels]
    if not fitting:
        raise KeyError(f"The labels have no key for image {name}. Key them by the file name without its ending.")
    found = [_checked(labels[key], name) for key in fitting]
    if not all(np.array_equal(each, found[0]) for each in found):
        raise KeyError(f"The keys {fitting} all fit image {name}, and their labels differ. Keep one of them.")
    return found[0]


def _keys_of(name: str) -> list[Any]:
    """The keys under which data sets keep the image ``name``."""
    if match := _VOC.fullmatch(name):
        return [name, int(match[1] + match[2])]
    if match := _COCO.fullmatch(name):
        padded = match[1].zfill(12)
        others = (padded, f"COCO_train2014_{padded}", f"COCO_val2014_{padded}", int(padded))
        return [name, *(key for key in others if key != name)]
    return [name]


def _checked(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
    array = array[0] if array.ndim == 2 and len(array) == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"The labels of image {name} are {kind_of(array)}. Give each image (C,) numbers.")
    if np.isnan(array).any():
        raise ValueError(f"The labels of image {name} hold NaN. Write 1 for each class present and 0 for the others.")
    return array
