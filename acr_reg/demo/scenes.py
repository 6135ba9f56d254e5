"""Synthetic scenes with exact masks, composed from files that scikit-image and matplotlib ship: no download.

A scene is a crop of one of scikit-image's photographs. One to three pictograms of matplotlib's DejaVu Sans font, each
of another class, are rotated, filled with a random colour and stripes, and placed on it. Unlike digits, pictograms stay
recognisable under a horizontal flip. Training scenes crop the left part of each photograph; development and test scenes
crop the rest, so that no background pixel is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from acr_reg.integrations.formats.photos import open_photo

PICTOGRAMS = {
    "snowman": "\u2603",
    "umbrella": "\u2602",
    "aeroplane": "\u2708",
    "telephone": "\u260e",
    "skull": "\u2620",
    "anchor": "\u2693",
    "star": "\u2605",
    "heart": "\u2665",
}
CLASSES = tuple(PICTOGRAMS)
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "gravel.png",
    "grass.png",
    "brick.png",
)
SIZE = 64  # pixels, the scene's side
SPLITS = {"train": 0, "dev": 1, "test": 2}  # part of the random seed, so that no two splits share a scene

_TRAIN_SHARE = 0.6  # of a photograph's width
_TURN = 30.0  # degrees, the largest rotation either way
_SIZES = (26, 40)  # pixels, the longer side of an unrotated pictogram
_ANGLES, _STEPS = 25, 4  # how many rotations and sizes are rendered, once
_RENDER = 160  # pixels, the font size the shapes are rendered at before they are shrunk


@dataclass(frozen=True)
class Scenes:
    """Images (S,3,H,W) uint8, masks (S,H,W) uint8 with background 0 and class c as c + 1, labels (S,C) 0.0 or 1.0."""

    images: Tensor
    masks: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def compose(count: int, seed: int, split: str) -> Scenes:
    """Makes `count` scenes, the same for the same seed and split. Raises KeyError if `split` is not in SPLITS."""
    rng = np.random.default_rng([seed, SPLITS[split]])
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        image[:] = crop_photograph(rng, split)
        for class_index in rng.permutation(len(CLASSES))[: rng.integers(1, 4)]:
            place(rng, int(class_index), image, mask)
    labels = (masks.reshape(count, -1, 1) == np.arange(1, len(CLASSES) + 1)).any(axis=1)
    return Scenes(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        masks=torch.from_numpy(masks),
        labels=torch.from_numpy(labels).float(),
    )


def to_input(images: Tensor) -> Tensor:
    """Maps uint8 images (B,3,H,W) to floats in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def crop_photograph(rng: np.random.Generator, split: str) -> np.ndarray:
    photograph = photographs()[rng.integers(len(PHOTOGRAPHS))]
    height, width = photograph.shape[:2]
    border = int(width * _TRAIN_SHARE)
    first, last = (0, border - SIZE) if split == "train" else (border, width - SIZE)
    left = rng.integers(first, last + 1)
    top = rng.integers(height - SIZE + 1)
    return photograph[top : top + SIZE, left : left + SIZE]


def place(rng: np.random.Generator, class_index: int, image: np.ndarray, mask: np.ndarray) -> None:
    """Paints one pictogram where it covers no other. Leaves it out if thirty tries find no such place."""
    shape = shapes()[class_index][rng.integers(_ANGLES * _STEPS)]
    height, width = shape.silhouette.shape
    for _ in range(30):
        top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
        window = (slice(top, top + height), slice(left, left + width))
        if not mask[window][shape.silhouette].any():
            fill = striped_fill(rng, height, width)
            fill[~shape.ink] += 128  # wraps: what an outline encloses is half the range away from it, whatever the fill
            image[window][shape.silhouette] = fill[shape.silhouette]
            mask[window][shape.silhouette] = class_index + 1
            return


def striped_fill(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pixels (height, width, 3) uint8: a random colour with darker stripes of random direction and width."""
    colour = rng.integers(64, 256, 3)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 12)
    rows, columns = np.mgrid[:height, :width]
    phase = (rows * np.sin(angle) + columns * np.cos(angle)) / period
    return np.where((phase % 1.0 > 0.6)[..., None], colour * 2 // 3, colour).astype(np.uint8)


@lru_cache(maxsize=1)
def photographs() -> list[np.ndarray]:
    """The photographs at half their size, as uint8 RGB, so that a 64 px crop shows objects and not only textures."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which scikit-image's wheels ship. "
            "Run pip install --force-reinstall scikit-image."
        )
    return [np.asarray(open_photo(folder / name).reduce(2)) for name in PHOTOGRAPHS]


@dataclass(frozen=True)
class Shape:
    """A rotated pictogram, boolean (height, width): its ink, and its silhouette, in which enclosed holes are filled."""

    ink: np.ndarray
    silhouette: np.ndarray


@lru_cache(maxsize=1)
def shapes() -> list[list[Shape]]:
    """For each class, every rotation at every size."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _RENDER)
    angles = np.linspace(-_TURN, _TURN, _ANGLES)
    sides = np.linspace(*_SIZES, _STEPS)
    return [
        [shape for angle in angles for shape in render(character, font, angle, sides)]
        for character in PICTOGRAMS.values()
    ]


def render(character: str, font: ImageFont.FreeTypeFont, angle: float, sides: np.ndarray) -> list[Shape]:
    """One rotation at every size. Holes are filled before shrinking, which may break a thin outline."""
    printed = Image.new("L", (2 * _RENDER, 2 * _RENDER))
    ImageDraw.Draw(printed).text((_RENDER, _RENDER), character, font=font, fill=255, anchor="mm")
    left, top, right, bottom = bounding_box(printed)
    turned = printed.rotate(float(angle), Image.Resampling.BICUBIC)
    ink = turned.crop(bounding_box(turned))
    silhouette = Image.fromarray(np.uint8(255) * binary_fill_holes(np.asarray(ink) > 127))
    scales = sides / max(right - left, bottom - top)
    sizes = [(round(ink.width * scale), round(ink.height * scale)) for scale in scales]
    return [
        Shape(
            ink=np.asarray(ink.resize(size, Image.Resampling.BOX)) > 80,
            silhouette=np.asarray(silhouette.resize(size, Image.Resampling.BOX)) > 127,
        )
        for size in sizes
    ]


def bounding_box(image: Image.Image) -> tuple[int, int, int, int]:
    box = image.getbbox()
    if box is None:
        raise RuntimeError("A pictogram is empty: DejaVu Sans is not matplotlib's own copy. Reinstall matplotlib.")
    return box
