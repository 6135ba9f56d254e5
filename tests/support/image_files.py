"""Image files that Pillow cannot write: of few or many bits a band, with metadata in odd places."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Which pixels (y, x) each pass of an interlaced PNG holds.
ADAM7 = [
    (slice(y, None, down), slice(x, None, right))
    for y, x, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
]
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(
    path: Path,
    values: NDArray[np.integer],
    depth: int,
    colour_type: int,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
) -> Path:
    """Values (H, W) or (H, W, bands) of ``depth`` bits; chunks ``before`` and ``after`` the pixels."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    passes = [values[part] for part in ADAM7] if interlaced else [values]
    rows = b"".join(b"\0" + _packed(row.reshape(-1), depth) for each in passes if each.size for row in each)
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(rows)) + after
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b""))
    return path


def write_tiff(
    path: Path, size: tuple[int, int], data: bytes, bits: tuple[int, ...], tags: dict[int, int], order: str = "<"
) -> Path:
    """An uncompressed TIFF of ``size`` (H, W) with one strip and further ``tags``. ``order`` is struct's."""
    height, width = size
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: len(bits), 278: height, 279: len(data), **tags}
    at = 8 + len(data)
    extra = b"".join(struct.pack(order + "H", each) for each in bits)
    block = b""
    for tag in sorted([*entries, 258]):
        if tag == 258:
            value = extra.ljust(4, b"\0") if len(bits) < 3 else struct.pack(order + "I", at)
            block += struct.pack(order + "HHI", 258, 3, len(bits)) + value
        else:
            block += struct.pack(order + "HHII", tag, 4, 1, entries[tag])
    directory = struct.pack(order + "H", len(entries) + 1) + block + struct.pack(order + "I", 0)
    mark = b"II" if order == "<" else b"MM"
    start = at + len(extra)
    path.write_bytes(mark + struct.pack(order + "HI", 42, start) + data + extra + directory)
    return path


def _packed(row: NDArray[np.integer], depth: int) -> bytes:
    """Values as a PNG or a TIFF stores a row: the highest bit first."""
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = (row[:, None].astype(np.uint8) >> np.arange(depth - 1, -1, -1, dtype=np.uint8)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def packed_rows(values: NDArray[np.integer], depth: int) -> bytes:
    """(H, W) values of ``depth`` bits, each row filled up to whole bytes."""
    bits = (values[..., None].astype(np.uint16) >> np.arange(depth - 1, -1, -1, dtype=np.uint16)) & 1
    return b"".join(np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits)
