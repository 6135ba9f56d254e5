"""Opens photos of every kind as people see them: upright, in RGB of 8 bits."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

_TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that swap width and height
_ORIENTATION = 0x0112


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """The photo in RGB, 8 bits a band, turned as its EXIF orientation says. A later turn by EXIF changes nothing.

    Grey, palette, CMYK and YCbCr are converted as Pillow does it; transparency is dropped, as training scripts drop it.
    16 bits are scaled by their range, 0 to 65535, and floats from [0, 1].

    Raises:
        ValueError: floats leave [0, 1], or the range of the numbers is unknown, as for integers of 32 bits.
        OSError: there is no such file, or Pillow cannot read it.
    """
    with Image.open(path) as stored:
        photo = ImageOps.exif_transpose(stored)
        assert photo is not None
        if photo.mode in ("RGB", "1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
            return photo.convert("RGB")
        if photo.mode.startswith("I;16") or (photo.mode == "I" and stored.format in ("PNG", "PPM")):
            values = np.asarray(photo).astype(np.float64) / 65535
        elif photo.mode == "F":
            values = np.asarray(photo).astype(np.float64)
        else:
            raise ValueError(
                f"{path} is an image of mode {photo.mode}, whose range is unknown. Save it with 8 or 16 bits a band, "
                'or read it in your transform (transform_takes="path").'
            )
    if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
        raise ValueError(
            f"{path} holds floats from {values.min():.4g} to {values.max():.4g}. Scale them to [0, 1], or read the "
            'file in your transform (transform_takes="path").'
        )
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def photo_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(H, W) of the photo in pixels as :func:`open_photo` returns it, read from the header alone."""
    with Image.open(path) as stored:
        turned = stored.getexif().get(_ORIENTATION) in _TURNED
        return (stored.width, stored.height) if turned else (stored.height, stored.width)
