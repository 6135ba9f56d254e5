"""docs/reference/photos_and_masks.md: each row of its tables is tried on a file of that kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acr_reg.integrations.formats.masks import read_mask, save_mask
from acr_reg.integrations.formats.photos import open_photo, photo_size
from tests.support.image_files import GREY as GREY_PNG
from tests.support.image_files import write_png
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "reference" / "photos_and_masks.md").read_text(encoding="utf-8")
RAMP = np.linspace(0, 1, 12).reshape(3, 4)
GREY = np.rint(RAMP * 255).astype(np.uint8)
IDS = np.array([[0, 1, 2], [1, 0, 1]], np.uint8)


def rows(heading: str) -> dict[str, str]:
    """First and second cell of each row of the table under a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1] for cells in table[2:]}


def photo(path: Path, kind: str) -> Path:
    """A file of this kind that shows GREY, or RAMP."""
    image = Image.fromarray(GREY)
    if kind == "grey or palette":
        image.quantize(16).save(path / "a.png")
    elif kind == "CMYK":
        image.convert("RGB").convert("CMYK").save(path / "a.tif")
        return path / "a.tif"
    elif kind == "with transparency":
        alpha = Image.fromarray(np.where(GREY > 100, 0, 255).astype(np.uint8))
        Image.merge("LA", (image, alpha)).save(path / "a.png")
    elif kind == "grey of 16 bits":
        Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)).save(path / "a.png")
    elif kind.startswith("floats"):
        factor = 2 if "beyond" in kind else np.nan if "NaN" in kind else 1
        Image.fromarray((RAMP * factor).astype(np.float32)).save(path / "a.tif")
        return path / "a.tif"
    elif kind == "integers of 32 bits":
        Image.fromarray((RAMP * 1e6).astype(np.int32)).save(path / "a.tif")
        return path / "a.tif"
    elif kind == "several frames":
        image.save(path / "a.tif", save_all=True, append_images=[Image.new("L", (4, 3))])
        return path / "a.tif"
    elif kind == "damaged EXIF":
        image.save(path / "a.png", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    elif kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90), np.uint8)).save(path / "b.png")
        (path / "a.png").write_bytes((path / "b.png").read_bytes()[:4000])
    else:
        raise AssertionError(f"No file is made of the kind {kind!r}.")
    return path / "a.png"


@pytest.mark.parametrize("kind", rows("Photos"))
def test_photos_are_read_as_the_page_says(tmp_path: Path, kind: str) -> None:
    if kind.startswith("with an EXIF orientation"):
        for ending in re.findall(r"JPEG|PNG|TIFF|WebP", kind):
            exif = Image.Exif()
            exif[0x0112] = 6
            side = np.ascontiguousarray(np.rot90(np.repeat(np.repeat(GREY, 16, 0), 16, 1)))
            file = tmp_path / f"a.{ending.lower()}"
            Image.fromarray(side).convert("RGB").save(file, exif=exif)
            assert open_photo(file).size == (64, 48) and photo_size(file) == (48, 64)
            assert np.asarray(open_photo(file))[8, 8, 0] < 12 < np.asarray(open_photo(file))[8, 24, 0]
        return
    file = photo(tmp_path, kind)
    if rows("Photos")[kind].startswith("refused"):
        with pytest.raises((OSError, ValueError), match=r"a\.(png|tif)"):
            open_photo(file)
        return
    found = open_photo(file)
    assert found.mode == "RGB" and photo_size(file) == (3, 4)
    assert np.abs(np.asarray(found).astype(int) - GREY[..., None]).max() <= 1


def coloured(ids: np.ndarray, other: bool = False) -> Image.Image:
    colours = np.array([(0, 0, 0), (128, 0, 0), (224, 224, 192)], np.uint8)
    return Image.fromarray(colours[ids] + np.uint8(other))


MASKS: dict[str, Callable[[Path], object]] = {
    "palette PNG": lambda path: save_mask(path / "a.png", IDS),
    "BMP or TIFF, grey or palette": lambda path: Image.fromarray(IDS).save(path / "a.bmp"),
    "RGB in VOC's colours": lambda path: coloured(IDS).save(path / "a.png"),
    "RGB in other colours": lambda path: coloured(IDS, other=True).save(path / "a.png"),
    "JPEG": lambda path: Image.fromarray(IDS).save(path / "a.jpg"),
    "WebP": lambda path: coloured(IDS).save(path / "a.webp"),
    "GIF": lambda path: Image.fromarray(IDS).save(path / "a.gif"),
    "TIFF with JPEG compression": lambda path: Image.fromarray(IDS).save(path / "a.tif", compression="jpeg"),
    "several frames": lambda path: coloured(IDS).save(
        path / "a.png", save_all=True, append_images=[coloured(IDS[::-1])]
    ),
    "floats": lambda path: Image.fromarray(IDS.astype(np.float32)).save(path / "a.tif"),
}


@pytest.mark.parametrize("kind", rows("Masks"))
def test_masks_are_read_as_the_page_says(tmp_path: Path, kind: str) -> None:
    if kind == "grey PNG of 1, 2, 4, 8 or 16 bits":
        for bits in (1, 2, 4, 8, 16):
            ids = (IDS.astype(int) % 2**bits * (1000 if bits == 16 else 1)).astype(np.uint16)
            assert (read_mask(write_png(tmp_path / "a.png", ids, bits, GREY_PNG)) == ids).all()
        return
    MASKS[kind](tmp_path)
    (file,) = tmp_path.iterdir()
    if rows("Masks")[kind].startswith("refused"):
        with pytest.raises(ValueError, match=re.escape(file.name)):
            read_mask(file)
        return
    ids = np.where(IDS == 2, 255, IDS) if kind.startswith("RGB") else IDS
    assert (read_mask(file) == ids).all()
