"""Opens images as people see them: upright, and photos of every kind in RGB of 8 bits."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274  # tags of TIFF, the last of EXIF too
# What shows an image of each orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_EIGHT_BITS = ("RGB", "1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_UNMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_FULL_RANGE = ("PNG", "PPM", "TIFF", "JPEG2000")  # what the numbers of 16 bits reach in other formats is unknown
_TEXTS = (b"iTXt", b"zTXt", b"tEXt")
_ORIENTING_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_LONGEST_TEXT = max(map(len, _ORIENTING_TEXTS))


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Open a photo in RGB, 8 bits a band, turned as its EXIF orientation says. A later turn by EXIF changes nothing.

    Grey, palette, CMYK and YCbCr are converted as Pillow does it; transparency is dropped, as training scripts drop it.
    Grey of 12 or 16 bits is scaled by its range, such as 0 to 65535, and floats from [0, 1]. Damaged EXIF is ignored.
    A file of several frames gives its first. Any number of pixels is read, also where Pillow's own limit is lower.

    Raises:
        ValueError: floats leave [0, 1], or the range of the numbers is unknown, as for integers of 32 bits.
        OSError: there is no such file, it is damaged, or Pillow does not know its format.

    >>> import numpy as np
    >>> from PIL import Image
    >>> Image.fromarray(np.full((30, 40), 32768, np.uint16)).save("photo.png")
    >>> photo = open_photo("photo.png")
    >>> photo.mode, photo.size, photo.getpixel((0, 0))
    ('RGB', (40, 30), (128, 128, 128))
    """
    with opened(path) as stored:
        return upright(stored, _in_rgb(stored, path))


def photo_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the size (H, W) of a photo in pixels, as :func:`open_photo` returns it.

    The header gives it; only a PNG whose EXIF follows the pixels is decoded. Raises OSError as :func:`open_photo` does,
    but not for damaged pixels.

    >>> from PIL import Image
    >>> exif = Image.Exif()
    >>> exif[0x0112] = 6  # a camera that was held upright
    >>> Image.new("RGB", (40, 30)).save("photo.jpg", exif=exif)
    >>> photo_size("photo.jpg")
    (40, 30)
    """
    with opened(path, decode=_exif_follows_pixels(path)) as stored:
        width, height = stored.size
        if stored.format == "TIFF":  # some versions of Pillow give the size before the turn, and some after it
            width, height = stored.tag_v2[_WIDTH], stored.tag_v2[_HEIGHT]  # type: ignore[attr-defined]
        return (width, height) if _orientation(stored) in _ON_ITS_SIDE else (height, width)


@contextmanager
def opened(path: str | os.PathLike[str], decode: bool = True) -> Iterator[Image.Image]:
    """The first frame of an image file. Raises OSError with the path, whatever Pillow raises for a damaged file."""
    with open(path, "rb") as file:  # given a name, Pillow maps some TIFFs into memory and scrambles those it must turn
        try:
            with _of_any_size:
                image = Image.open(file)
                if decode:
                    image.load()
        except UnidentifiedImageError as error:
            message = f"{path} is in no format that Pillow reads. Save it as PNG."
            raise UnidentifiedImageError(message) from error
        except MemoryError as error:
            raise OSError(f"{path} is too large for the memory. Save it with fewer pixels.") from error
        except Exception as error:
            raise OSError(f"{path} is damaged: {error}. Get the file again, or leave it out.") from error
        with image:
            yield image


class _OfAnySize:
    """Pillow warns of large images and refuses larger ones, as files of strangers. These are the user's own. Its limit
    is one for all threads, so the last to leave restores it."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.limit = Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                Image.MAX_IMAGE_PIXELS = self.limit


_of_any_size = _OfAnySize()


def upright(stored: Image.Image, image: Image.Image) -> Image.Image:
    """``image``, made from the decoded file ``stored``, turned as that says. The result asks for no turn."""
    if stored.format != "TIFF" and _orientation(stored) in _TURNS:  # Pillow turns TIFFs itself as it decodes them
        image = image.transpose(_TURNS[_orientation(stored)])
    image.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return image


def bits_of_tiff(stored: Image.Image) -> int:
    """Bits of one band of a TIFF."""
    return int(stored.tag_v2.get(_BITS, (1,))[0])  # type: ignore[attr-defined]


def is_inverted_tiff(stored: Image.Image) -> bool:
    """Whether 0 is white. Pillow inverts such numbers of 1 to 8 bits, and leaves others as they are."""
    return stored.format == "TIFF" and stored.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]


def _orientation(stored: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or where it cannot be read."""
    try:
        # PNG's own getexif decodes the pixels, in case EXIF follows them.
        found = Image.Image.getexif(stored).get(_ORIENTATION)
    except Exception:  # damaged EXIF may fail anywhere; the pixels are still good
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _exif_follows_pixels(path: str | os.PathLike[str]) -> bool:
    """Whether this is a PNG in which something that can hold an orientation comes after the pixels."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            start = file.read(min(length, _LONGEST_TEXT))
            if pixels and (kind == b"eXIf" or (kind in _TEXTS and start.startswith(_ORIENTING_TEXTS))):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length - len(start) + 4, os.SEEK_CUR)
    return False


def _in_rgb(stored: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """RGB, 8 bits a band, not turned."""
    mode = stored.mode
    stored.info.pop("transparency", None)  # dropped anyway; with it Pillow warns, or carries it along
    if mode in _EIGHT_BITS:
        return stored.convert("RGB")
    if mode in _UNMULTIPLIED:
        return stored.convert(_UNMULTIPLIED[mode]).convert("RGB")
    if mode.startswith("I;16") and stored.format in _FULL_RANGE:
        highest = 2 ** (bits_of_tiff(stored) if stored.format == "TIFF" else 16) - 1
    elif mode == "I" and stored.format in ("PNG", "PPM"):  # Pillow's mode for 16 bits in these two
        highest = 65535
    elif mode == "F":
        highest = 1
    else:
        raise ValueError(f"{path} has mode {mode}, whose range is unknown. Save it as PNG with 8 or 16 bits.")
    values: npt.NDArray[np.float32] = np.asarray(stored).astype(np.float32) / highest
    if np.isnan(values).any():
        raise ValueError(f"{path} holds NaN. Fill in the missing pixels, and save it again.")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"{path} holds values from {values.min():.4g} to {values.max():.4g}. Scale them to [0, 1], or save 8 bits."
        )
    values = 1 - values if is_inverted_tiff(stored) else values
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
