"""A folder of tiny photos in VOC layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 56


def write_photo_folder(
    root: Path, classes: Sequence[str], labels: Mapping[str, Sequence[int]], splits: Mapping[str, str]
) -> Path:
    """Photos of coloured noise. ``labels`` number the classes from 1; each fills 30 x 14 px of the mask, the rest is
    background where ``classes`` begins with it, else the first label; four rows are unknown. ``splits``: ids apart by
    spaces."""
    first = int(classes[0] == "background")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    shifted = {name: [number - 1 + first for number in numbers] for name, numbers in labels.items()}
    for name, numbers in shifted.items():
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        mask = np.full((HEIGHT, WIDTH), 0 if first else numbers[0], np.uint8)
        mask[:4] = 255
        for column, number in enumerate(numbers):
            mask[10:, 10 + 20 * column : 24 + 20 * column] = number
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
    for split, ids in splits.items():
        (root / "ImageSets" / f"{split}.txt").write_text("\n".join(ids.split()) + "\n")
    (root / "image_labels.json").write_text(json.dumps({"classes": list(classes), "labels": shifted}))
    return root
