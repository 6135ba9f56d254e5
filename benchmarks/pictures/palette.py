"""Pictures in a palette: they take a quarter of the bytes and are as easy to read."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.colors import to_rgb
from matplotlib.typing import ColorType
from PIL import Image


def with_few_colours(picture: Image.Image, colours: int = 256, kept: Sequence[ColorType] = ()) -> Image.Image:
    """An RGB picture in that many colours and the ``kept`` ones (256 in all), which stay however few pixels have them.
    It is not dithered, because that would make it large."""
    chosen = picture.quantize(colours, dither=Image.Dither.NONE)
    if not kept:
        return chosen
    palette = chosen.getpalette()
    assert palette is not None
    holder = Image.new("P", (1, 1))
    holder.putpalette(palette[: 3 * colours] + [round(255 * channel) for each in kept for channel in to_rgb(each)])
    return picture.quantize(palette=holder, dither=Image.Dither.NONE)
