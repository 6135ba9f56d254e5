"""A folder of photos in VOC layout: JPEGImages, SegmentationClassAug or SegmentationClass,
ImageSets/{train,dev,test}.txt and image_labels.json with {"classes": [names], "labels": {id: [class numbers]}}.

Class numbers are the masks' ids, 255 is unknown. The set has a background where its class 0 is named "background".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from acr_reg.errors import CommandError

UNKNOWN = 255
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


@dataclass(frozen=True)
class PhotoFolder:
    """`numbers` are the folder's class numbers of the classes kept; `names` are theirs, after "background" if there is
    one, so that a mask's new id k is names[k]. `labels` are the folder's, by image id."""

    root: Path
    masks: Path
    background: bool
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    labels: dict[str, list[int]]
    splits: dict[str, list[str]]

    def label_matrix(self, ids: Sequence[str]) -> Tensor:
        """(images, classes kept), float 0 or 1: image-level labels."""
        return torch.tensor([[float(number in self.labels[name]) for number in self.numbers] for name in ids])

    def photo(self, name: str) -> Image.Image:
        return Image.open(self.root / "JPEGImages" / f"{name}.jpg").convert("RGB")

    def mask(self, name: str) -> NDArray[np.uint8]:
        """(H,W): the new ids, 255 for the classes left out."""
        return self._new_ids()[np.asarray(Image.open(self.masks / f"{name}.png"))]

    def _new_ids(self) -> NDArray[np.uint8]:
        table = np.full(256, UNKNOWN, np.uint8)
        if self.background:
            table[0] = 0
        table[list(self.numbers)] = np.arange(len(self.numbers)) + int(self.background)
        return table


def open_folder(root: Path, classes: Sequence[str] | None = None) -> PhotoFolder:
    """Reads lists and labels; images later. `classes` names those to keep, None keeps all.

    Photos without any label among those kept are left out. Raises CommandError where something is missing.
    """
    content = _read_json(root / "image_labels.json")
    names, labels = content["classes"], content["labels"]
    background = names[0] == "background"
    unknown = sorted(set(classes or ()) - set(names[int(background) :]))
    if unknown:
        raise CommandError(
            f"found no class {', '.join(unknown)}; expected some of {', '.join(names[int(background) :])}; "
            "correct --classes"
        )
    kept = [number for number in range(int(background), len(names)) if classes is None or names[number] in classes]
    splits = {split: _read_list(root / "ImageSets" / f"{split}.txt", labels) for split in ("train", "dev", "test")}
    labelled = {split: [i for i in ids if set(labels[i]) & set(kept)] for split, ids in splits.items()}
    return PhotoFolder(
        root=root,
        masks=_mask_folder(root),
        background=background,
        numbers=tuple(kept),
        names=tuple(["background"] * background + [names[number] for number in kept]),
        labels=labels,
        splits=labelled,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["classes"], list) or not isinstance(content["labels"], dict):
            raise TypeError("classes is no list or labels no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{path} cannot be read ({error}); expected a JSON object with classes (a list of names) and labels "
            "(image id to a list of class numbers); write it from the data set's annotation"
        ) from error
    return content


def _read_list(path: Path, labels: dict[str, list[int]]) -> list[str]:
    try:
        ids = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error}); expected a list of image ids; write the split") from error
    missing = [name for name in ids if name not in labels]
    if missing or not ids:
        what = f"{len(missing)} ids without labels, such as {missing[0]}" if missing else "no ids"
        raise CommandError(f"{path}: found {what}; expected ids that image_labels.json has labels for; correct either")
    return ids


def _mask_folder(root: Path) -> Path:
    for name in MASK_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise CommandError(f"found no {' or '.join(MASK_FOLDERS)} in {root}; expected masks, for evaluation; add them")
