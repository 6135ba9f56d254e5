"""Reads image labels, the classes present in each image, and finds an image in them by its name."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from acr_reg.errors import some
from acr_reg.integrations.formats.files import kind_of
from acr_reg.integrations.formats.numpy_files import read_file, read_npy
from acr_reg.metrics import as_array

# Names that end in a number: VOC's 2007_000032, COCO's COCO_train2014_000000000139 and 000000000139.
_VOC = re.compile(r"((?:19|20)[0-9]{2})_?([0-9]{6})")
_COCO = re.compile(r"(?:COCO_[a-z]+[0-9]{4}_)?([0-9]{1,12})")
MOST_LABELS = 500_000_000  # classes times images of a .json file, whose few bytes become as many numbers
_COCO_2014 = ("COCO_train2014_", "COCO_val2014_")


def load_image_labels(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Read the labels of all images: ID -> (C,) numbers, above 0 for the classes present. No code in the file is run.

    A ``.npy`` file holds a dict, as ``cls_labels.npy`` (PSA, IRN and what builds on them) and ``cls_labels_onehot.npy``
    (AFA, ToCo) do. IRN's integer keys become file names: 2007000032 becomes 2007_000032, and 139 becomes COCO's
    000000000139. A ``.json`` file holds ``{"classes": [names], "labels": {ID: [class numbers]}}``. If its class 0 is
    named "background", that has no column: column 0 is class 1.

    Args:
        path: a .npy or .json file.

    Raises:
        ValueError: the file holds something else, two keys mean one image, or labels differ in length or hold NaN.
        FileNotFoundError: there is no such file.

    >>> import numpy as np
    >>> np.save("cls_labels.npy", {2007000032: np.array([0.0, 1.0, 0.0])})
    >>> labels = load_image_labels("cls_labels.npy")
    >>> labels["2007_000032"].tolist()
    [0.0, 1.0, 0.0]
    """
    path = Path(path)
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"{path}: The name ends in {path.suffix!r}. Image labels are .npy or .json files: give one.")
    return read_file(path, _from_npy if path.suffix == ".npy" else _from_json)


def _from_npy(data: bytes) -> dict[str, npt.NDArray[Any]]:
    return _named(read_npy(data))


def _from_json(data: bytes) -> dict[str, npt.NDArray[Any]]:
    return _named(_one_hot(json.loads(data.decode("utf-8"), object_pairs_hook=_each_once)))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"The file has {some(twice)} more than once. Keep one of each.")
    return dict(pairs)


def labels_of(labels: Mapping[Any, npt.ArrayLike], name: str) -> npt.NDArray[Any]:
    """Look up the labels (C,) of the image ``name``, a file name without its ending.

    ``labels`` is what :func:`load_image_labels` returns, or any dict like it. Its keys may also be IRN's numbers:
    2007000032 for 2007_000032, and 139 for 000000000139 and for COCO_train2014_000000000139. COCO's names of 2014 and
    of 2017 stand for each other.

    Raises:
        KeyError: no key fits the name; or the name itself is no key, two others fit, and their labels differ.
        ValueError: ``labels`` is no dict, or the labels are not (C,) numbers, or hold NaN.

    >>> labels_of({2007000032: [0.0, 1.0, 0.0]}, "2007_000032").tolist()
    [0.0, 1.0, 0.0]
    """
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"labels is {kind_of(labels)}, not a dict from ID to labels. Read the file with load_image_labels, or call "
            ".item() on what np.load returns."
        )
    if name in labels:
        return _checked(labels[name], name)
    fitting = [key for key in _other_keys(name) if key in labels]
    if not fitting:
        raise KeyError(f"There are no labels of image {name}. Key them by the file name without its ending.")
    first, *others = (_checked(labels[key], name) for key in fitting)
    if not all(np.array_equal(first, other) for other in others):
        raise KeyError(f"The keys {fitting} all fit image {name}, and their labels differ. Keep one of them.")
    return first


def _other_keys(name: str) -> list[Any]:
    """The keys under which data sets keep the image ``name``, besides the name itself."""
    if match := _VOC.fullmatch(name):
        return [int(match[1] + match[2]), f"{match[1]}_{match[2]}"]
    if match := _COCO.fullmatch(name):
        padded = match[1].zfill(12)
        return [int(padded), padded, *(prefix + padded for prefix in _COCO_2014)]
    return []


def _name_of(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or key < 0:
        raise ValueError(f"The key {key!r} is not the name of an image. Key the labels by file names without endings.")
    voc = _VOC.fullmatch(str(key))
    return f"{voc[1]}_{voc[2]}" if voc else str(key).zfill(12)


def _named(content: Any) -> dict[str, npt.NDArray[Any]]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"The file holds {kind_of(content)}. Save a dict from each image's name to its (C,) labels.")
    found: dict[str, npt.NDArray[Any]] = {}
    for key, values in content.items():
        name = _name_of(key)
        if name in found:
            raise ValueError(f"Two keys mean image {name}, one of them {key!r}. Keep one of them.")
        found[name] = _checked(values, name)
    lengths = {len(values): name for name, values in found.items()}
    if len(lengths) > 1:
        raise ValueError(
            f"The labels differ in length: {dict(list(lengths.items())[:3])}. Give each image (C,) labels."
        )
    return found


def _one_hot(content: Any) -> dict[str, npt.NDArray[Any]]:
    """``{"classes": [names], "labels": {ID: [class numbers]}}`` as (C,) labels, without the background."""
    if not isinstance(content, dict) or not {"classes", "labels"} <= content.keys():
        raise ValueError('The file does not hold {"classes": [names], "labels": {ID: [class numbers]}}. Write it so.')
    if len(content["classes"]) * len(content["labels"]) > MOST_LABELS:
        raise ValueError(f"The file has more than {MOST_LABELS:,} classes times images. Save .npy labels by parts.")
    first = int(content["classes"][:1] == ["background"])
    found = {}
    for name, numbers in content["labels"].items():
        values = np.zeros(len(content["classes"]), np.float32)
        for number in numbers:
            if type(number) is not int or not first <= number < len(values):
                raise ValueError(f"Image {name} has the class {number!r}. Use {first} to {len(values) - 1}.")
            values[number] = 1
        found[name] = values[first:]
    return found


def _checked(values: Any, name: str) -> npt.NDArray[Any]:
    array = as_array(values)
    array = array[0] if array.ndim == 2 and len(array) == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"The labels of image {name} are {kind_of(array)}. Give each image (C,) numbers.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"The labels of image {name} hold NaN or infinity. Write 1 for each class present and 0 for the others."
        )
    return array
