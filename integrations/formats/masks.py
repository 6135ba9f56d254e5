"""Reads and writes label maps: one image of class ids, as masks and pseudo labels are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from acr_reg.integrations.formats.photos import bits_of_tiff, is_inverted_tiff, opened, upright
from acr_reg.integrations.formats.write import replacing
from acr_reg.metrics import as_array

_EXACT = ("PNG", "BMP", "DIB", "TIFF", "PPM")  # not GIF: those who write it number the palette anew
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
_ONE_BAND = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "PA")
_COLOURS = ("RGB", "RGBA", "RGBX")
_SHOWN = 3
_PPM_HEADER = 4096  # bytes that hold it, with comments


def read_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.integer]:
    """Read the ids (H, W) of a label map: uint8 if all are below 256, else int32.

    They are the indices of a palette image, the values of a grey one as they are stored, in 1 to 16 bits (Pillow itself
    stretches 2 and 4 bits to 0..255), or those whose colours in VOC's palette an RGB image shows: (224, 224, 192) is
    255. Transparency is ignored. The map is turned as its EXIF orientation says, as photos are.

    Raises:
        ValueError: the format may change ids (JPEG, WebP, GIF), a colour is none of VOC's, values are floats or
            negative, a TIFF stores white as 0, or the file holds several frames.
        OSError: there is no such file, it is damaged, or Pillow does not know its format.

    >>> import numpy as np
    >>> save_mask("mask.png", np.array([[0, 15, 255]]))
    >>> read_mask("mask.png")
    array([[  0,  15, 255]], dtype=uint8)
    """
    with opened(path) as stored:
        compression = stored.info.get("compression") if stored.format == "TIFF" else None
        if stored.format not in _EXACT or compression in _LOSSY_TIFF:
            kind = f"{stored.format} file" + (f" with {compression} compression" if compression else "")
            raise ValueError(f"{path} is a {kind}, which may change ids. Save the ids as a palette or grey PNG.")
        if getattr(stored, "is_animated", False):
            raise ValueError(f"{path} holds several frames. Save the ids of each image as a palette or grey PNG.")
        if is_inverted_tiff(stored) and stored.mode != "1":
            raise ValueError(f"{path} stores white as 0, and readers differ in its ids. Save ids as a grey PNG.")
        mode, largest = stored.mode, _largest_value(path, stored)
        if mode not in (*_ONE_BAND, *_WITH_ALPHA, *_COLOURS) or (mode not in _ONE_BAND and largest > 255):
            depth = " with 16 bits a band" if mode in (*_WITH_ALPHA, *_COLOURS) else ""
            raise ValueError(f"{path} is an image of mode {mode}{depth}. Save the ids as a palette or grey PNG.")
        shown = 65535 if mode == "I" and stored.format == "PPM" else 255
        pixels = np.asarray(upright(stored, stored))
    if mode in _COLOURS:
        return _ids_of_colours(path, pixels[..., :3])
    ids = pixels[..., 0] if mode in _WITH_ALPHA else pixels
    if (mode in ("L", "LA") or shown > 255) and largest < shown:
        ids = np.rint(ids * (largest / shown))  # as they were before Pillow stretched them
    if ids.min() < 0:
        raise ValueError(f"{path} holds the id {ids.min()}. Save ids of 0 and more as a palette or grey PNG.")
    return ids.astype(np.uint8 if ids.max() < 256 else np.int32)


def save_mask(
    path: str | os.PathLike[str], ids: npt.NDArray[np.integer], text: Mapping[str, str] | None = None
) -> None:
    """Write ids (H, W) in 0 to 255 as a palette PNG in VOC's colours. The file appears whole or not at all.

    ``text`` is kept beside the pixels: Pillow has it in ``Image.open(path).info``. Raises ValueError for other shapes,
    types or ids.
    """
    values = as_array(ids)
    if values.ndim != 2 or values.dtype.kind not in "iub" or not values.size:
        raise ValueError(f"{path}: a {values.dtype} array {values.shape} is no label map. Pass integer ids (H, W).")
    if not 0 <= values.min() <= values.max() < 256:
        raise ValueError(f"{path}: ids from {values.min()} to {values.max()} do not fit. Pass ids from 0 to 255.")
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
    for bit in range(8):
        colours[:, bit % 3] |= ((ids >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    colours.flags.writeable = False  # one array for all callers
    return colours


def _largest_value(path: str | os.PathLike[str], stored: Image.Image) -> int:
    """The largest value that the file's bits, or its header, allow in a band."""
    if stored.format == "PNG":
        with open(path, "rb") as file:
            return 2 ** int(file.read(25)[24]) - 1
    if stored.format == "TIFF":
        return 2 ** bits_of_tiff(stored) - 1
    if stored.format == "PPM" and stored.mode != "1":
        with open(path, "rb") as file:
            return int(re.sub(rb"#[^\r\n]*", b"", file.read(_PPM_HEADER)).split(None, 4)[3])
    return 255


def _ids_of_colours(path: str | os.PathLike[str], pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    bands = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    ids = np.zeros(pixels.shape[:2], np.uint8)
    for bit in range(8):
        ids |= (bands[bit % 3] >> (7 - bit // 3) & 1) << bit  # back from voc_palette
    wrong = ((bands[0] | bands[1]) & 31 | bands[2] & 63) != 0  # bits that no colour of the palette has
    if wrong.any():
        colours = [tuple(each) for each in np.unique(pixels[wrong], axis=0)[:_SHOWN].tolist()]
        raise ValueError(
            f"{path} has colours that are not VOC's, such as {colours}. Save the ids as a palette or grey PNG."
        )
    return ids
