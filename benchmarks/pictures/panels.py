"""The panels of views.py: photographs under a map, with stripes where nothing is shown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from acr_reg import Lattice
from benchmarks.pictures.palette import with_few_colours

Box = tuple[float, float, float, float]  # top, left, height, width in pixels
Colour = tuple[float, float, float]

CAM = (0.90, 0.16, 0.16)
ROW = (0.00, 0.42, 0.95)
MARKS = ("#39ff14", "#ff2bd6")  # of the first and the second box: hues that no photograph here contains

_STRENGTH = 0.88  # how much of a pixel a full map value colours
_FADE = 0.55  # how much of the photograph's grey is left under a map
_STRIPE = 12  # pixels from stripe to stripe
_KEPT = (*MARKS, CAM, ROW, "white", "black")  # always in the PNG's palette, however few pixels need them
_COLOURS = 200  # of the palette, beside those
_WIDTH, _GAP, _TITLE = 14.0, 0.08, 0.28  # inches: the picture, between panels, above a row of them


@dataclass(frozen=True)
class Panel:
    """A picture (3, H, W) in [0, 1] under its title, with boxes drawn on it."""

    title: str
    picture: Tensor
    boxes: list[Box] = field(default_factory=list)

    def striped(self, hidden: Tensor) -> Panel:
        return replace(self, picture=striped(self.picture, hidden))

    def marked(self, box: Box) -> Panel:
        return replace(self, boxes=[*self.boxes, box])


def box_around(mask: Tensor) -> Box:
    """The box that a mask (H, W) fills."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left


def spread(values: Tensor, lattice: Lattice, size: Sequence[int]) -> Tensor:
    """The values of a lattice's tokens on the pixels of their cells, (H, W); 0 beyond the last cell."""
    along = []
    for axis, count in ((0, lattice.height), (1, lattice.width)):
        places = (torch.arange(size[axis]) + 0.5) * lattice.extent[axis] / size[axis]
        along.append(((places - lattice.offset[axis]) / lattice.stride[axis]).floor().long())
        along[axis] = along[axis].where((along[axis] >= 0) & (along[axis] < count), count)
    padded = torch.nn.functional.pad(values.reshape(lattice.height, lattice.width), (0, 1, 0, 1))
    return padded[along[0][:, None], along[1][None]]


def over_tokens(title: str, picture: Tensor, values: Tensor, valid: Tensor, lattice: Lattice, colour: Colour) -> Panel:
    """The values of tokens (N,) over the picture, and stripes where they are not ``valid`` or there is no token."""
    size = picture.shape[-2:]
    panel = Panel(title, overlay(picture, spread(values, lattice, size), colour))
    return panel.striped(spread(valid.double(), lattice, size) == 0)


def overlay(picture: Tensor, opacity: Tensor, colour: Colour) -> Tensor:
    """The picture in light grey under a colour of (H, W) opacity."""
    grey = 1 - _FADE * (1 - picture.mean(0, keepdim=True)).expand(3, -1, -1)
    share = _STRENGTH * opacity.clamp(0, 1)
    return grey * (1 - share) + share * torch.tensor(colour, dtype=grey.dtype)[:, None, None]


def striped(picture: Tensor, hidden: Tensor) -> Tensor:
    """The picture with grey stripes where it is ``hidden`` (H, W)."""
    rows, columns = torch.arange(hidden.shape[0])[:, None], torch.arange(hidden.shape[1])[None]
    stripes = 0.88 - 0.2 * ((rows + columns) % _STRIPE < _STRIPE // 4).float()
    return picture.where(~hidden, stripes)


def draw(path: Path, rows: Sequence[Sequence[Panel]], dpi: int = 100) -> None:
    """Write a PNG, 14 inches wide, with at most 256 colours."""
    columns = max(map(len, rows))
    across = _WIDTH / columns
    down = (across - _GAP) * 2 / 3 + _TITLE
    figure = Figure(figsize=(_WIDTH, len(rows) * down))
    FigureCanvasAgg(figure)
    full = rows[0][0].picture.shape[-2:]
    for i, panels in enumerate(rows):
        for j, panel in enumerate(panels):
            left, bottom = (j * across + _GAP / 2) / _WIDTH, 1 - (i + 1 - _GAP / 4) / len(rows)
            bounds = (left, bottom, (across - _GAP) / _WIDTH, (down - _TITLE) / down / len(rows))
            ax = figure.add_axes(bounds, anchor="N")
            _show(ax, panel, full, font=13 if columns < 6 else 11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with_few_colours(Image.open(drawn).convert("RGB"), _COLOURS, _KEPT).save(path, optimize=True)


def _show(ax: Axes, panel: Panel, full: Sequence[int], font: int) -> None:
    height, width = panel.picture.shape[-2:]
    ax.imshow(panel.picture.movedim(0, -1).clamp(0, 1).numpy(), interpolation="antialiased")
    ax.text(width / 2, -0.02 * full[0], panel.title, fontsize=font, horizontalalignment="center")
    ax.set_axis_off()
    if height <= full[0] and width <= full[1]:  # to the scale of the image
        ax.set(xlim=(-0.5, full[1] - 0.5), ylim=(full[0] - 0.5, -0.5))
    outline: Box = (0, 0, height, width)
    for (top, left, high, wide), colour, line in [
        (outline, "black", 1.0),
        *((box, "black", 4.5) for box in panel.boxes),
        *((box, mark, 2.5) for box, mark in zip(panel.boxes, MARKS, strict=False)),
    ]:
        corner = (left - 0.5, top - 0.5)
        ax.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=line, clip_on=False))
