"""The PNG: a column for each image; rows for the image, the truth and every condition's raw class maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

_STRENGTH = 0.85  # how much of a pixel a full map value colours
_UNKNOWN = 255

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Picture:
    """An image (h,w,3), its mask (H,W), the ids present (K,), and per condition their raw maps (K,H,W) in 0..1."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    present: list[int]
    maps: dict[str, Floats] = field(default_factory=dict)


def draw(
    path: Path, pictures: Sequence[Picture], names: Sequence[str], background: bool, title: str, dpi: int = 100
) -> None:
    """Writes the PNG. `names` are those of the masks' ids. With a background a map's value is its opacity; without one
    each pixel takes the colour of its highest map."""
    columns = [panels(picture, background) for picture in pictures]
    headings = list(columns[0])
    figure = Figure(figsize=(1.9 * len(columns) + 0.3, 1.9 * len(headings) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(headings), len(columns), squeeze=False)
    for column, contents in enumerate(columns):
        for row, panel in enumerate(contents.values()):
            axes[row, column].imshow(panel, aspect="auto")
            axes[row, column].set(xticks=[], yticks=[])
    for row, heading in enumerate(headings):
        axes[row, 0].set_ylabel(heading, fontsize=9)
    seen = sorted({label for picture in pictures for label in picture.present})
    patches = [Patch(color=colour(label), label=names[label]) for label in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 8), fontsize=8, frameon=False)
    figure.savefig(path, dpi=dpi)


def panels(picture: Picture, background: bool) -> dict[str, Floats]:
    """What a column shows, by the name of its row: (H,W,3) each, in 0..1."""
    height, width = picture.mask.shape
    image = np.asarray(Image.fromarray(picture.image).resize((width, height), Image.Resampling.BICUBIC)) / 255
    truth = picture.mask == np.array(picture.present).reshape(-1, 1, 1)
    shown = {"image": image, "truth": overlay(image, truth, picture)}
    for condition, maps in picture.maps.items():
        highest = maps == maps.max(axis=0, initial=0.0)
        opacity = highest * (maps if background else 1.0)
        shown[f"CAM {condition}"] = overlay(image, opacity, picture)
    return shown


def overlay(image: Floats, opacity: Floats, picture: Picture) -> Floats:
    """The classes' colours, (K,H,W) opacities, over the image in grey; white where the mask is unknown."""
    blended = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    blended[picture.mask == _UNKNOWN] = 1.0
    for label, share in zip(picture.present, _STRENGTH * opacity[..., None], strict=True):
        blended = blended * (1 - share) + share * np.array(colour(label))
    return blended


def colour(label: int) -> tuple[float, float, float]:
    """A saturated colour; neighbouring ids are a golden section of the colour wheel apart."""
    red, green, blue = hsv_to_rgb((label * 0.618 % 1.0, 0.85, 0.95))
    return float(red), float(green), float(blue)
