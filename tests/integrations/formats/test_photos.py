"""Photos of every kind that cameras, scanners and tools write come out upright, in RGB of 8 bits, or are refused."""

import io
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from acr_reg.integrations.formats.photos import open_photo, photo_size
from tests.support.image_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    packed_rows,
    png_chunk,
    write_png,
    write_tiff,
)

H, W = 6, 9
RAMP = np.linspace(0, 1, H * W).reshape(H, W)  # of a photo that is brighter below than above
EIGHT = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN = np.rint(RAMP * 65535).astype(np.uint16)
COLOURS = np.stack([EIGHT, EIGHT[::-1], EIGHT[:, ::-1]], axis=-1)
GREYS = EIGHT[..., None].repeat(3, axis=-1)
ORIENTATIONS = range(1, 9)
TURNS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}  # what EXIF says of each value, in numpy


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def pixels(photo: Image.Image) -> np.ndarray:
    assert photo.mode == "RGB"
    return np.asarray(photo).astype(int)


def close(photo: Image.Image, expected: np.ndarray, by: int = 0) -> bool:
    return pixels(photo).shape == expected.shape and np.abs(pixels(photo) - expected).max() <= by


# ---------------------------------------------------------------- the turn of EXIF


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "mpo"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photo_is_turned_as_its_exif_says_and_only_once(tmp_path, suffix, orientation):
    best = {"quality": 100, "subsampling": 0}
    options = {"jpg": best, "mpo": {"save_all": True, **best}, "webp": {"lossless": True}}.get(suffix, {})
    path = saved(tmp_path / f"photo.{suffix}", COLOURS, exif=exif_of(orientation), **options)
    expected = TURNS[orientation](COLOURS)
    photo = open_photo(path)
    assert close(photo, expected, by=8 if suffix in ("jpg", "mpo") else 0)
    assert close(ImageOps.exif_transpose(photo), expected, by=8 if suffix in ("jpg", "mpo") else 0)
    assert photo_size(path) == expected.shape[:2]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_a_tiff_is_turned_once_whichever_way_it_is_decoded(tmp_path, mode, compression):
    """Pillow maps some of these into memory, with width and height swapped."""
    flat = np.asarray(Image.fromarray(COLOURS).convert(mode).convert("RGB"))
    for orientation in ORIENTATIONS:
        path = saved(tmp_path / "photo.tif", COLOURS, mode, exif=exif_of(orientation), compression=compression)
        assert close(open_photo(path), TURNS[orientation](flat)), orientation
        assert photo_size(path) == TURNS[orientation](flat).shape[:2]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_deep_and_palette_photos_are_turned_too(tmp_path, orientation):
    exif = exif_of(orientation)
    for path, expected, by in (
        (saved(tmp_path / "deep.png", SIXTEEN, exif=exif), GREYS, 0),
        (saved(tmp_path / "deep.tif", SIXTEEN, exif=exif), GREYS, 0),
        (saved(tmp_path / "float.tif", RAMP.astype(np.float32), exif=exif), GREYS, 0),
        (saved(tmp_path / "palette.png", COLOURS, "P", exif=exif), np.asarray(_palette().convert("RGB")), 0),
    ):
        assert close(open_photo(path), TURNS[orientation](expected), by)
        assert photo_size(path) == TURNS[orientation](expected).shape[:2]


def _palette() -> Image.Image:
    return Image.fromarray(COLOURS).convert("P")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_is_found_wherever_a_png_may_keep_it(tmp_path, orientation):
    """Before the pixels, after them, as the text that ImageMagick writes, or as XMP."""
    block = exif_of(orientation).tobytes()[6:]
    raw = b"\nexif\n%8d\n" % (len(block) + 6) + (b"Exif\0\0" + block).hex().encode() + b"\n"
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    chunks = [
        png_chunk(b"eXIf", block),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    ]
    for number, chunk in enumerate(chunks):
        for place in ("before", "after"):
            path = write_png(tmp_path / f"{number}{place}.png", COLOURS, 8, RGB, **{place: chunk})
            assert close(open_photo(path), TURNS[orientation](COLOURS)), (number, place)
            assert close(ImageOps.exif_transpose(open_photo(path)), TURNS[orientation](COLOURS)), (number, place)
            assert photo_size(path) == TURNS[orientation](COLOURS).shape[:2], (number, place)


@pytest.mark.parametrize(
    "block",
    [
        b"\x00\x08\x00\x02\x01\x12\x00\x03",  # no TIFF header
        b"MM\x00\x2a",
        b"II\x2a\x00\xff\xff\xff\x7f",
        b"II\x2a\x00\x08\x00\x00\x00\xff\xff" + b"\xff" * 40,
        exif_of(6).tobytes()[6:-30] + b"\xff" * 5,
        b"",
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Metadata Warning", "ignore:Truncated File Read")
def test_a_photo_with_damaged_exif_is_read(tmp_path, block, suffix):
    path = tmp_path / f"photo.{suffix}"
    if suffix == "png":
        write_png(path, COLOURS, 8, RGB, before=png_chunk(b"eXIf", block))
    else:
        saved(path, COLOURS, exif=b"Exif\0\0" + block, quality=100)
    photo = open_photo(path)
    assert photo_size(path) == (photo.height, photo.width)
    assert np.sort(pixels(photo)[..., 0].ravel()).tolist()[-1] > 200  # the pixels are there
    assert ImageOps.exif_transpose(photo).size == photo.size  # which may raise where the file's EXIF is kept


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    path = saved(tmp_path / "photo.png", COLOURS, exif=exif_of(orientation))
    assert close(open_photo(path), COLOURS)
    assert photo_size(path) == (H, W)


def test_the_size_is_read_without_decoding(tmp_path):
    path = saved(tmp_path / "photo.png", COLOURS, exif=exif_of(6))
    path.write_bytes(path.read_bytes()[: -len(COLOURS.tobytes()) // 4])
    with pytest.raises(OSError, match=r"photo\.png is damaged.* leave it out"):
        open_photo(path)
    assert photo_size(path) == (W, H)


# ---------------------------------------------------------------- kinds of pixels


def _png_with_alpha(path: Path) -> Path:
    alpha = np.full((H, W), 7, np.uint8)
    return saved(path, np.dstack([COLOURS, alpha]))


def _palette_with_transparency(path: Path) -> Path:
    image = _palette()
    image.info["transparency"] = bytes([0, 128, 255])
    image.save(path)
    return path


def _premultiplied(path: Path) -> Path:
    halved = np.dstack([COLOURS // 2, np.full((H, W), 128, np.uint8)])
    return write_tiff(path, (H, W), halved.tobytes(), (8, 8, 8, 8), {262: 2, 338: 1})


def _two_frames(path: Path) -> Path:
    first, second = Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)
    first.save(path, save_all=True, append_images=[second])
    return path


KINDS: dict[str, tuple[Callable[[Path], Path], np.ndarray, int]] = {
    "rgb.png": (lambda path: saved(path, COLOURS), COLOURS, 0),
    "rgb.bmp": (lambda path: saved(path, COLOURS), COLOURS, 0),
    "rgb.ppm": (lambda path: saved(path, COLOURS), COLOURS, 0),
    "grey.png": (lambda path: saved(path, EIGHT), GREYS, 0),
    "grey.jpg": (lambda path: saved(path, EIGHT, quality=100), GREYS, 2),
    "grey 2 bits.png": (lambda path: write_png(path, EIGHT // 64, 2, GREY), GREYS // 64 * 85, 0),
    "grey 16 bits.png": (lambda path: write_png(path, SIXTEEN, 16, GREY), GREYS, 0),
    "grey 16 bits.pgm": (lambda path: saved(path, SIXTEEN.astype(np.int32)), GREYS, 0),
    "grey 10 bits.pgm": (
        lambda path: path.write_bytes(b"P5 9 6 1023\n" + np.rint(RAMP * 1023).astype(">u2").tobytes()) and path,
        GREYS,
        1,
    ),
    "grey 16 bits.tif": (lambda path: saved(path, SIXTEEN), GREYS, 0),
    "grey 16 bits.jp2": (lambda path: saved(path, SIXTEEN), GREYS, 1),
    "grey 16 bits big-endian.tif": (
        lambda path: write_tiff(path, (H, W), SIXTEEN.astype(">u2").tobytes(), (16,), {}, ">"),
        GREYS,
        0,
    ),
    "grey 16 bits, 0 is white.tif": (
        lambda path: write_tiff(path, (H, W), (65535 - SIXTEEN).astype("<u2").tobytes(), (16,), {262: 0}),
        GREYS,
        0,
    ),
    "grey 12 bits.tif": (
        lambda path: write_tiff(path, (H, W), packed_rows(np.rint(RAMP * 4095).astype(int), 12), (12,), {}),
        GREYS,
        1,
    ),
    "grey 8 bits, 0 is white.tif": (
        lambda path: write_tiff(path, (H, W), (255 - EIGHT).tobytes(), (8,), {262: 0}),
        GREYS,
        0,
    ),
    "rgb 16 bits.png": (
        lambda path: write_png(path, COLOURS.astype(np.uint16) * 257, 16, RGB),
        COLOURS,
        0,
    ),
    "rgba 16 bits.png": (
        lambda path: write_png(path, np.dstack([COLOURS, EIGHT]).astype(np.uint16) * 257, 16, RGBA),
        COLOURS,
        0,
    ),
    "grey and alpha 16 bits.png": (
        lambda path: write_png(path, np.dstack([EIGHT, EIGHT]).astype(np.uint16) * 257, 16, GREY_ALPHA),
        GREYS,
        0,
    ),
    "rgb 16 bits.tif": (
        lambda path: write_tiff(
            path, (H, W), (COLOURS.astype("<u2") * 257).astype("<u2").tobytes(), (16, 16, 16), {262: 2}
        ),
        COLOURS,
        0,
    ),
    "floats.tif": (lambda path: saved(path, RAMP.astype(np.float32)), GREYS, 0),
    "floats big-endian.tif": (
        lambda path: write_tiff(path, (H, W), RAMP.astype(">f4").tobytes(), (32,), {339: 3}, ">"),
        GREYS,
        0,
    ),
    "cmyk.jpg": (lambda path: saved(path, COLOURS, "CMYK", quality=100, subsampling=0), COLOURS, 3),
    "cmyk.tif": (lambda path: saved(path, COLOURS, "CMYK"), COLOURS, 0),
    "one bit.png": (lambda path: saved(path, EIGHT > 127), (GREYS > 127) * 255, 0),
    "one bit.tif": (lambda path: saved(path, EIGHT > 127), (GREYS > 127) * 255, 0),
    "palette.png": (lambda path: saved(path, COLOURS, "P"), np.asarray(_palette().convert("RGB")), 0),
    "palette 1 bit.png": (
        lambda path: write_png(
            path, (EIGHT > 127).astype(np.uint8), 1, PALETTE, png_chunk(b"PLTE", bytes([9, 8, 7, 200, 100, 50]))
        ),
        np.where((EIGHT > 127)[..., None], [200, 100, 50], [9, 8, 7]),
        0,
    ),
    "palette with transparency.png": (_palette_with_transparency, np.asarray(_palette().convert("RGB")), 0),
    "grey with a transparent value.png": (
        lambda path: write_png(path, EIGHT, 8, GREY, png_chunk(b"tRNS", struct.pack(">H", 128))),
        GREYS,
        0,
    ),
    "alpha.png": (_png_with_alpha, COLOURS, 0),
    "grey and alpha.png": (lambda path: saved(path, EIGHT, "LA"), GREYS, 0),
    "premultiplied.tif": (_premultiplied, COLOURS, 2),
    "frames.gif": (_two_frames, COLOURS, 60),
    "frames.png": (_two_frames, COLOURS, 0),
    "pages.tif": (_two_frames, COLOURS, 0),
    "phone.mpo": (_two_frames, COLOURS, 40),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_photo_has_the_right_colours_and_size(tmp_path, name):
    write, expected, by = KINDS[name]
    path = write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = open_photo(path)
    assert close(photo, expected, by)
    assert photo_size(path) == (H, W)
    assert path.unlink() is None  # nothing keeps the file open where that matters


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("integers.tif", lambda path: saved(path, EIGHT.astype(np.int32)), "mode I, whose range is unknown"),
        (
            "signed.tif",
            lambda path: write_tiff(path, (H, W), SIXTEEN.astype("<i2").tobytes(), (16,), {339: 2}),
            "mode I, whose range is unknown",
        ),
        ("floats.tif", lambda path: saved(path, RAMP.astype(np.float32) * 255), "from 0 to 255.* to \\[0, 1\\]"),
        ("nan.tif", lambda path: saved(path, np.full((H, W), np.nan, np.float32)), "holds NaN"),
        ("negative.tif", lambda path: saved(path, RAMP.astype(np.float32) - 0.5), "from -0.5 to 0.5"),
        ("lab.tif", lambda path: _lab(path), "mode LAB"),
    ],
)
def test_photos_whose_range_is_unknown_are_refused_by_name(tmp_path, name, write, message):
    path = write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} .*{message}.*(Save|save)"):
        open_photo(path)
    assert photo_size(path) == (H, W)


def _lab(path: Path) -> Path:
    Image.merge("LAB", [Image.fromarray(EIGHT)] * 3).save(path)
    return path


# ---------------------------------------------------------------- files that cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp", "jp2"])
def test_a_truncated_photo_is_an_os_error_that_names_the_file(tmp_path, suffix):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, {"jpg": "jpeg", "tif": "tiff", "jp2": "jpeg2000"}.get(suffix, suffix))
    path = tmp_path / f"photo.{suffix}"
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
        with pytest.raises(OSError, match=rf"photo\.{suffix} is (damaged|in no format)"):
            open_photo(path)


def test_missing_and_foreign_files_are_os_errors_that_name_the_file(tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    for read in (open_photo, photo_size):
        with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
            read(tmp_path / "none.jpg")
        with pytest.raises(OSError, match=r"text\.jpg is in no format"):
            read(tmp_path / "text.jpg")
        with pytest.raises(OSError, match=tmp_path.name):
            read(tmp_path)


def test_a_photo_keeps_its_colour_profile_and_no_other_metadata(tmp_path):
    path = saved(tmp_path / "photo.png", COLOURS, exif=exif_of(6), icc_profile=b"profile", dpi=(72, 72))
    assert open_photo(path).info == {"icc_profile": b"profile"}


def test_the_turns_of_this_file_are_those_of_exif(tmp_path):
    """The table in numpy agrees with Pillow's own."""
    for orientation in ORIENTATIONS:
        path = saved(tmp_path / "photo.png", COLOURS, exif=exif_of(orientation))
        with Image.open(path) as stored:
            assert close(ImageOps.exif_transpose(stored), TURNS[orientation](COLOURS))


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_photos_beyond_pillows_limit_are_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    path = saved(tmp_path / "photo", GREYS, format=format)
    for limit in (H * W - 1, H * W // 2 - 1):  # Pillow warns, and refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert (photo_size(path), open_photo(path).size) == ((H, W), (W, H))
        assert limit == Image.MAX_IMAGE_PIXELS


def test_threads_and_bad_files_leave_pillows_limit_as_it_was(tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "good.png", GREYS), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:60])
    before = Image.MAX_IMAGE_PIXELS

    def read(path: Path) -> None:
        with suppress(OSError):
            open_photo(path)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, [good, bad] * 50))
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_photo_that_does_not_fit_in_memory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(OSError, match=r"huge\.png is too large for the memory"):
        open_photo(path)
