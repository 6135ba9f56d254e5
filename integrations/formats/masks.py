"""Reads and writes label maps: one image of class ids, as masks and pseudo labels are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from acr_reg.integrations.formats.write import replacing

IGNORED = 255
_EXACT = ("PNG", "BMP", "GIF", "TIFF", "PPM")  # formats that keep every value
_SHOWN = 3


def read_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.integer]:
    """The ids (H, W) of a label map: indices of a palette image, values of a grey one (1 to 16 bits), or VOC colours.

    Raises:
        ValueError: the format is lossy (JPEG, WebP), so that ids are not exact, or a colour is none of VOC's.
        OSError: there is no such file, or Pillow cannot read it.
    """
    with Image.open(path) as image:
        if image.format not in _EXACT:
            raise ValueError(
                f"{path} is a {image.format} file, whose compression changes ids. Save the ids as a palette (P) or "
                "grey (L) PNG."
            )
        if image.mode in ("RGB", "RGBA"):
            return _ids_of_colours(path, np.asarray(image.convert("RGB")))
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path} is an image of mode {image.mode}. Save the ids as a palette (P) or grey (L) PNG.")
        return np.asarray(image).astype(np.int64)


def save_mask(
    path: str | os.PathLike[str], ids: npt.NDArray[np.integer], text: Mapping[str, str] | None = None
) -> None:
    """Write ids (H, W) in 0 to 255 as a palette PNG in VOC's colours. The file appears whole or not at all.

    ``text`` is kept beside the pixels: Pillow has it in ``Image.open(path).info``. Raises ValueError for other shapes,
    types or ids."""
    values = np.asarray(ids)
    if (
        values.ndim != 2
        or values.dtype.kind not in "iub"
        or (values.size and not 0 <= values.min() <= values.max() < 256)
    ):
        raise ValueError(f"{path}: a {values.dtype} array {values.shape} is no label map. Pass ids (H, W) of 0 to 255.")
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    beside = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        beside.add_text(name, value)
    with replacing(Path(path)) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=beside)


@cache
def voc_palette() -> npt.NDArray[np.uint8]:
    """VOC's colours (256, 3): bits 0, 3, 6 of an id are the highest bits of red, 1, 4, 7 of green, 2, 5 of blue."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for step in range(3):
        for band in range(3):
            colours[:, band] |= (((ids >> (3 * step + band)) & 1) << (7 - step)).astype(np.uint8)
    return colours


def _ids_of_colours(path: str | os.PathLike[str], pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer]:
    weights = np.array([65536, 256, 1])
    known, asked = voc_palette() @ weights, pixels @ weights
    order = np.argsort(known)
    at = order[np.searchsorted(known, asked, sorter=order).clip(max=255)]
    wrong = known[at] != asked
    if wrong.any():
        colours = [tuple(each) for each in np.unique(pixels[wrong], axis=0)[:_SHOWN].tolist()]
        raise ValueError(
            f"{path} has colours that are not VOC's, such as {colours}. Save ids as a palette or grey PNG."
        )
    return at
