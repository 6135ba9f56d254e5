"""The picture of a run: a row for each image, with its truth and the class maps of each condition, for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from numpy.typing import NDArray
from PIL import Image

from acr_reg.demo.comparison import Picture

# Colours of Okabe and Ito, which people with any kind of colour blindness can tell apart.
RIGHT, WRONG = "#0072B2", "#E69F00"

_PANEL = 2.0  # inches, a panel's side: letters below stay readable where the picture is as wide as a phone
_LARGE, _SMALL = 17, 14  # points
_STRENGTH = 0.9  # share of a pixel that a map value of 1 colours
_UNKNOWN = 255
_OUTLINE = [Stroke(linewidth=3.0, foreground="black"), Normal()]

Floats = NDArray[np.floating]


def draw(
    path: Path, pictures: Sequence[Picture], names: Sequence[str], background: bool, title: str, dpi: int = 100
) -> None:
    """Writes the PNG: photo, truth and class maps of each condition side by side, the truth outlined on the maps.

    A pixel of a map is coloured by whether its highest map is that of its class in the truth. With a background, the
    value of the map is the opacity; without one, every pixel has a class. `names[i]` is the class with id i.
    """
    rows = [panels(picture, background) for picture in pictures]
    headings = list(rows[0])
    heights = [min(1.0, picture.mask.shape[0] / picture.mask.shape[1]) for picture in pictures]
    size = (_PANEL * len(headings) + 0.5, _PANEL * sum(heights) + 2.0)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    lines = [*textwrap.wrap(title, round(size[0] * 7.5)), *["stronger colour: higher map"] * background]
    figure.suptitle("\n".join(lines), fontsize=_SMALL)
    axes = figure.subplots(len(rows), len(headings), squeeze=False, height_ratios=heights)
    for picture, row, contents in zip(pictures, axes, rows, strict=True):
        row[0].set_ylabel("\n".join(names[label] for label in picture.present), fontsize=_SMALL)
        for axis, (heading, panel) in zip(row, contents.items(), strict=True):
            axis.imshow(panel)
            axis.set(xticks=[], yticks=[])
            if heading != "photo":
                outline(axis, picture)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading.replace(" ", "\n", 1), fontsize=_LARGE)
    figure.legend(handles=legend(background), loc="outside lower center", ncols=3, fontsize=_SMALL, frameon=False)
    figure.savefig(path, dpi=dpi)


def panels(picture: Picture, background: bool) -> dict[str, Floats]:
    """The panels of one row by the heading of their column, each (H,W,3) in 0..1."""
    height, width = picture.mask.shape
    photo = np.asarray(Image.fromarray(picture.image).resize((width, height), Image.Resampling.BICUBIC)) / 255
    truth = picture.mask == np.array(picture.present, int).reshape(-1, 1, 1)
    shown = {"photo": photo, "truth": painted(photo, truth, truth)}
    for condition, maps in picture.maps.items():
        highest = maps == maps.max(axis=0, initial=0.0)
        opacity = highest * (maps if background else 1.0) * (picture.mask != _UNKNOWN)
        shown[condition] = painted(photo, opacity, truth)
    return shown


def painted(photo: Floats, opacity: NDArray[np.generic], truth: NDArray[np.bool_]) -> Floats:
    """Colours the grey photo by the opacity of each class (K,H,W), where it is right and where it is wrong."""
    blended = 0.25 + 0.7 * photo.mean(axis=2, keepdims=True).repeat(3, axis=2)
    for colour, pixels in ((RIGHT, truth), (WRONG, ~truth)):
        share = _STRENGTH * (opacity * pixels).max(axis=0, initial=0.0)[..., None]
        blended = blended * (1 - share) + share * np.array(to_rgb(colour))
    return blended


def outline(axis: Axes, picture: Picture) -> None:
    """Draws the edge of each class that is present, white between black."""
    for label in picture.present:
        edge = axis.contour(picture.mask == label, levels=[0.5], colors="white", linewidths=1.2)
        edge.set_path_effects(_OUTLINE)


def legend(background: bool) -> list[Patch | Line2D]:
    wrong = "wrong: background or another class" if background else "wrong class"
    truth = Line2D([], [], color="white", linewidth=1.2, path_effects=_OUTLINE, label="truth")
    return [Patch(color=RIGHT, label="right class"), Patch(color=WRONG, label=wrong), truth]
