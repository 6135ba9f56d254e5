"""Reads a folder of photos in VOC layout.

The folder holds JPEGImages, SegmentationClassAug or SegmentationClass, ImageSets/{train,dev,test}.txt and
image_labels.json: {"classes": [names], "labels": {id: [class numbers]}}. Class numbers are the ids in the masks; 255 is
unknown. The set has a background if class 0 is named "background".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from acr_reg.errors import CommandError
from acr_reg.integrations.formats.masks import read_mask
from acr_reg.integrations.formats.photos import open_photo

UNKNOWN = 255
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


@dataclass(frozen=True)
class PhotoFolder:
    """A folder and the classes kept of it.

    `numbers` are the folder's numbers of these classes. `names` are their names, after "background" if there is one:
    names[k] has id k in the masks returned here. `labels` holds the folder's class numbers of each image.
    """

    root: Path
    masks: Path
    background: bool
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    labels: dict[str, list[int]]
    splits: dict[str, list[str]]

    def label_matrix(self, ids: Sequence[str]) -> Tensor:
        """Image-level labels (images, classes kept), 0.0 or 1.0."""
        return torch.tensor([[float(number in self.labels[name]) for number in self.numbers] for name in ids])

    def photo(self, name: str) -> Image.Image:
        """In RGB, upright. Raises CommandError if it cannot be read."""
        with _said_by_command():
            return open_photo(self.root / "JPEGImages" / f"{name}.jpg")

    def mask(self, name: str) -> NDArray[np.uint8]:
        """A mask (H,W) of the new ids, 255 for classes that are not kept. Raises CommandError if it holds no ids."""
        path = self.masks / f"{name}.png"
        with _said_by_command():
            ids = read_mask(path)
        if ids.max() > UNKNOWN:
            raise CommandError(f"{path} holds the id {ids.max()}. Use ids of 0 to {UNKNOWN}; {UNKNOWN} is unknown.")
        return self._new_ids()[ids]

    def _new_ids(self) -> NDArray[np.uint8]:
        table = np.full(256, UNKNOWN, np.uint8)
        if self.background:
            table[0] = 0
        table[list(self.numbers)] = np.arange(len(self.numbers)) + int(self.background)
        return table


def open_folder(root: Path, classes: Sequence[str] | None = None) -> PhotoFolder:
    """Reads the lists and labels, not the images. `classes` names the classes to keep; None keeps all.

    Photos without a kept label are left out. Raises CommandError if something is missing.
    """
    content = _read_json(root / "image_labels.json")
    names, labels = content["classes"], content["labels"]
    background = names[0] == "background"
    unknown = sorted(set(classes or ()) - set(names[int(background) :]))
    if unknown:
        raise CommandError(
            f"The folder has no class {', '.join(unknown)}. "
            f"Choose --classes from {', '.join(names[int(background) :])}."
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


@contextmanager
def _said_by_command() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # they name the file and the way out
        raise CommandError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["classes"], list) or not isinstance(content["labels"], dict):
            raise TypeError("classes is not a list or labels is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{path} cannot be read: {error}. "
            'Write it as {"classes": [names], "labels": {image id: [class numbers]}}.'
        ) from error
    return content


def _read_list(path: Path, labels: dict[str, list[int]]) -> list[str]:
    try:
        ids = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error}. Write the image ids of the split, one a line.") from error
    if not ids:
        raise CommandError(f"{path} is empty. Write the image ids of the split, one a line.")
    missing = [name for name in ids if name not in labels]
    if missing:
        raise CommandError(
            f"{path} has {len(missing)} image ids without labels, the first {missing[0]}. "
            "Add their labels to image_labels.json, or remove them from the list."
        )
    return ids


def _mask_folder(root: Path) -> Path:
    for name in MASK_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise CommandError(f"{root} has no folder {' or '.join(MASK_FOLDERS)}. Add the masks: scoring needs them.")
