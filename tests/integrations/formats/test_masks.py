"""Label maps keep their ids whatever file they are in, or the file is refused by name."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acr_reg.integrations.formats import save_cams
from acr_reg.integrations.formats.masks import read_mask, save_mask, voc_palette
from acr_reg.integrations.scoring import find_samples, score_cams
from acr_reg.metrics import CamMeanIoU
from tests.support.image_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    packed_rows,
    png_chunk,
    write_png,
    write_tiff,
)

IDS = np.array([[0, 1, 15, 20, 255], [0, 0, 7, 255, 2]], np.uint8)
SMALL = np.array([[0, 1, 2, 3, 1], [3, 0, 0, 2, 1]], np.uint8)  # fits 2 bits
COLOURS = voc_palette()[IDS]


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def read(path: Path) -> list[list[int]]:
    ids = read_mask(path)
    assert ids.dtype == (np.uint8 if ids.max() < 256 else np.int32)
    return ids.tolist()


# ---------------------------------------------------------------- ids as indices and as grey values


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_pngs_of_every_depth_hold_the_ids_that_were_written(tmp_path, depth, palette):
    """Pillow multiplies grey of 2 and 4 bits by 85 and 17: a perfect map would score nothing."""
    ids = np.minimum(IDS, 2**depth - 1)
    before = png_chunk(b"PLTE", voc_palette()[: 2**depth].tobytes()) if palette else b""
    path = write_png(tmp_path / "mask.png", ids, depth, PALETTE if palette else GREY, before)
    assert read(path) == ids.tolist()


@pytest.mark.parametrize(
    ("colour_type", "depth"),
    [
        *((GREY, depth) for depth in (1, 2, 4, 8, 16)),
        *((PALETTE, depth) for depth in (1, 2, 4, 8)),
        (GREY_ALPHA, 8),
        (RGB, 8),
    ],
)
def test_interlaced_pngs_hold_the_ids_that_were_written(tmp_path, depth, colour_type):
    ids = np.random.default_rng(depth).integers(0, 2**depth, (11, 13))
    values = {GREY_ALPHA: np.dstack([ids, ids // 2]), RGB: voc_palette()[ids % 256]}.get(colour_type, ids)
    before = png_chunk(b"PLTE", voc_palette()[: 2**depth].tobytes()) if colour_type == PALETTE else b""
    path = write_png(tmp_path / "mask.png", values, depth, colour_type, before, interlaced=True)
    assert read(path) == ids.tolist()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_other_chunks_of_a_small_grey_png_change_nothing(tmp_path, depth):
    """Transparency, significant bits, gamma, a background; and pixels in many chunks."""
    ids = np.minimum(IDS, 2**depth - 1)
    chunks = [(b"sBIT", b"\1"), (b"gAMA", struct.pack(">I", 45455)), (b"tRNS", b"\0\1"), (b"bKGD", b"\0\1")]
    for kind, data in chunks:
        assert read(write_png(tmp_path / "mask.png", ids, depth, GREY, png_chunk(kind, data))) == ids.tolist()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_perfect_map_of_small_grey_masks_scores_1(tmp_path, depth):
    ids = np.minimum(IDS, 2**depth - 1) % 3
    write_png(tmp_path / "a.png", ids, depth, GREY)
    save_cams(tmp_path / "a.npy", {number - 1: ids == number for number in range(1, ids.max() + 1)})
    found = score_cams(find_samples([("a", "a.png")], tmp_path, tmp_path), CamMeanIoU(4), progress=False)
    assert found.compute().best_miou == 1


def test_ids_of_16_bits_are_read_in_both_byte_orders(tmp_path):
    ids = IDS.astype(np.uint16) * 200
    assert read(write_png(tmp_path / "mask.png", ids, 16, GREY)) == ids.tolist()
    assert read(saved(tmp_path / "mask.tif", ids)) == ids.tolist()
    for order in "<>":
        data = ids.astype(order + "u2").tobytes()
        assert read(write_tiff(tmp_path / "mask.tif", ids.shape, data, (16,), {}, order)) == ids.tolist()
    assert read(write_png(tmp_path / "few.png", IDS.astype(np.uint16), 16, GREY)) == IDS.tolist()


def test_ids_of_32_bits_are_read_and_negative_ones_refused(tmp_path):
    ids = IDS.astype(np.int32) * 70_000
    assert read(saved(tmp_path / "mask.tif", ids)) == ids.tolist()
    with pytest.raises(ValueError, match=r"mask\.tif holds the id -1.* PNG"):
        read_mask(saved(tmp_path / "mask.tif", ids - 1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_tiffs_of_every_depth_hold_the_ids_that_were_written(tmp_path, depth):
    ids = np.minimum(IDS, 2**depth - 1)
    path = write_tiff(tmp_path / "mask.tif", ids.shape, packed_rows(ids, depth), (depth,), {})
    assert read(path) == ids.tolist()


@pytest.mark.parametrize("largest", [1, 3, 15, 20, 100, 255, 300, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgms_of_every_maximum_hold_the_ids_that_were_written(tmp_path, largest, plain):
    """Pillow stretches these too."""
    ids = np.minimum(IDS.astype(int) * (1 if largest < 256 else 2), largest)
    data = " ".join(map(str, ids.ravel())).encode() if plain else ids.astype(">u2" if largest > 255 else "u1").tobytes()
    path = tmp_path / "mask.pgm"
    path.write_bytes(b"P%d # a comment 9 9\n5 2\n# another\n%d\n" % (2 if plain else 5, largest) + data)
    assert read(path) == ids.tolist()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_lossless_formats_keep_the_ids(tmp_path, mode, suffix):
    image = Image.fromarray(IDS) if mode != "1" else Image.fromarray(IDS == 15)
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / f"mask.{suffix}")
    assert read(tmp_path / f"mask.{suffix}") == (IDS if mode != "1" else (IDS == 15).astype(int)).tolist()


def test_transparency_does_not_change_ids(tmp_path):
    clear = png_chunk(b"tRNS", bytes([0, 128]))
    palette = png_chunk(b"PLTE", voc_palette().tobytes())
    assert read(write_png(tmp_path / "palette.png", IDS, 8, PALETTE, palette + clear)) == IDS.tolist()
    transparent = png_chunk(b"tRNS", struct.pack(">H", 15))
    assert read(write_png(tmp_path / "grey.png", IDS, 8, GREY, transparent)) == IDS.tolist()
    with_alpha = np.dstack([IDS, 255 - IDS])
    assert read(write_png(tmp_path / "alpha.png", with_alpha, 8, GREY_ALPHA)) == IDS.tolist()
    assert read(saved(tmp_path / "colours.png", np.dstack([COLOURS, IDS]))) == IDS.tolist()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_lossless_tiffs_are_read_whatever_their_compression(tmp_path, compression):
    assert read(saved(tmp_path / "mask.tif", IDS, compression=compression)) == IDS.tolist()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_is_turned_as_its_exif_says(tmp_path, suffix):
    """As its photo is."""
    for orientation, expected in ((1, IDS), (3, IDS[::-1, ::-1]), (6, np.rot90(IDS, -1)), (8, np.rot90(IDS))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert read(saved(tmp_path / f"mask.{suffix}", IDS, exif=exif)) == expected.tolist()


# ---------------------------------------------------------------- colours


def test_vocs_palette_is_the_published_one():
    """From the development kit's labels.txt and the masks: background, aeroplane, bicycle, person, tv, ignored."""
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: tuple(voc_palette()[number].tolist()) for number in published} == published
    assert voc_palette()[255].tolist() == [224, 224, 192]
    assert len(np.unique(voc_palette(), axis=0)) == 256
    with pytest.raises(ValueError, match="read-only"):
        voc_palette()[0] = 1


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_vocs_colours_are_read_as_ids(tmp_path, suffix):
    assert read(saved(tmp_path / f"mask.{suffix}", COLOURS)) == IDS.tolist()
    every = voc_palette().reshape(16, 16, 3)
    assert read(saved(tmp_path / f"every.{suffix}", every)) == np.arange(256).reshape(16, 16).tolist()


def test_other_colours_are_refused_by_name(tmp_path):
    for colour in ((1, 0, 0), (255, 255, 255), (0, 0, 1), (15, 15, 15), (129, 0, 0)):
        pixels = COLOURS.copy()
        pixels[1, 0] = colour
        with pytest.raises(ValueError, match=rf"mask\.png .*not VOC's.*\({', '.join(map(str, colour))}\).* PNG"):
            read_mask(saved(tmp_path / "mask.png", pixels))


def test_every_bit_of_a_colour_counts(tmp_path):
    """The palette uses the three highest bits of red and green and the two highest of blue."""
    for band in range(3):
        for bit in range(8):
            colour = np.zeros((1, 1, 3), np.uint8)
            colour[..., band] = 1 << bit
            path = saved(tmp_path / "mask.png", colour)
            found = np.flatnonzero((voc_palette() == colour[0]).all(-1)).tolist()
            assert len(found) == (bit > (5 if band == 2 else 4))
            if found:
                assert read(path) == [found]
            else:
                with pytest.raises(ValueError, match="not VOC's"):
                    read_mask(path)


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow keeps the high byte alone, in which 128 is 0."""
    path = write_png(tmp_path / "mask.png", COLOURS.astype(np.uint16), 16, RGB)
    with pytest.raises(ValueError, match=r"mask\.png .*mode RGB with 16 bits"):
        read_mask(path)
    path = write_png(tmp_path / "mask.png", np.dstack([IDS, IDS]).astype(np.uint16), 16, GREY_ALPHA)
    with pytest.raises(ValueError, match=r"mask\.png .*mode (LA|RGBA) with 16 bits"):
        read_mask(path)


# ---------------------------------------------------------------- files that may not hold the ids that were meant


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "JPEG2000", "GIF", "MPO"])
def test_formats_that_may_change_ids_are_refused_whatever_the_suffix(tmp_path, format, suffix):
    """GIF compresses without loss, but those who write it number the palette anew."""
    path = saved(tmp_path / f"mask.{suffix}", IDS, format=format)
    name = "JPEG|MPO" if format == "MPO" else format
    with pytest.raises(ValueError, match=rf"mask\.{suffix} is a ({name}) file, which may change ids.* PNG"):
        read_mask(path)


def test_a_webp_without_loss_is_refused_too(tmp_path):
    """It holds colours only; ids come back as (15, 15, 15)."""
    with pytest.raises(ValueError, match=r"WEBP file"):
        read_mask(saved(tmp_path / "mask.webp", IDS, lossless=True))


@pytest.mark.parametrize("array", [IDS, COLOURS])
def test_a_tiff_with_jpeg_compression_is_refused(tmp_path, array):
    with pytest.raises(ValueError, match=r"mask\.tif is a TIFF file with jpeg compression"):
        read_mask(saved(tmp_path / "mask.tif", array.repeat(8, 0).repeat(8, 1), compression="jpeg"))


@pytest.mark.parametrize("mode", ["F", "CMYK", "LAB"])
def test_modes_that_hold_no_ids_are_refused_by_name(tmp_path, mode):
    image = Image.merge("LAB", [Image.fromarray(IDS)] * 3) if mode == "LAB" else Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match=rf"mask\.tif is an image of mode {mode}"):
        read_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_several_frames_are_refused(tmp_path, suffix):
    path = tmp_path / f"mask.{suffix}"
    Image.fromarray(IDS).save(path, save_all=True, append_images=[Image.fromarray(IDS[::-1].copy())])
    with pytest.raises(ValueError, match=rf"mask\.{suffix} holds several frames"):
        read_mask(path)


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_tiffs_that_store_white_as_0_are_refused(tmp_path, depth):
    """Pillow inverts those of up to 8 bits, other readers do not."""
    path = write_tiff(tmp_path / "mask.tif", SMALL.shape, packed_rows(SMALL, depth), (depth,), {262: 0})
    with pytest.raises(ValueError, match=r"mask\.tif stores white as 0"):
        read_mask(path)


@pytest.mark.parametrize("compression", ["raw", "group4"])
def test_masks_of_one_bit_come_back_as_pillow_wrote_them(tmp_path, compression):
    """Of which group4 stores white as 0."""
    assert read(saved(tmp_path / "mask.tif", SMALL > 0, compression=compression)) == (SMALL > 0).astype(int).tolist()


def test_files_that_cannot_be_read_are_os_errors_that_name_them(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 21, (64, 64), dtype=np.uint8)).save(whole, "PNG")
    for content in (b"", b"text", whole.getvalue()[:20], whole.getvalue()[:500]):
        (tmp_path / "mask.png").write_bytes(content)
        with pytest.raises(OSError, match=r"mask\.png is (damaged|in no format)"):
            read_mask(tmp_path / "mask.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_mask(tmp_path / "none.png")


# ---------------------------------------------------------------- written


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_saved_ids_come_back_and_show_vocs_colours(tmp_path, dtype):
    ids = np.arange(256).reshape(8, 32).astype(dtype)
    save_mask(tmp_path / "mask.png", ids)
    assert read(tmp_path / "mask.png") == ids.tolist()
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert (np.asarray(image.convert("RGB")) == voc_palette()[ids]).all()
        assert (np.asarray(image) == ids).all()


@pytest.mark.parametrize(
    "ids", [IDS - 1.0, IDS[None], IDS.astype(int) - 1, IDS.astype(int) + 1, np.zeros((0, 4), int), np.array([["a"]])]
)
def test_what_is_no_label_map_is_not_written(tmp_path, ids):
    (tmp_path / "mask.png").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"mask\.png: .*Pass"):
        save_mask(tmp_path / "mask.png", ids)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
    assert (tmp_path / "mask.png").read_bytes() == b"old"
