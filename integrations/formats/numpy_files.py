"""Reads the content of .npy and .npz files: what of a file is trusted, and how much memory it may ask for."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt

from acr_reg.integrations.formats.files import DamagedFile, FileError, unreadable
from acr_reg.integrations.formats.unpickle import MOST_BYTES, check_sizes, unpickled

T = TypeVar("T")

_TOO_LARGE = "The memory is too small for what this file holds. Free some, or use fewer workers."
_LONGEST_HEADER = 10_000  # numpy's own limit, which old versions do not have


def read_file(path: str | os.PathLike[str], decode: Callable[[bytes], T]) -> T:
    """``decode`` of the content. An OSError is one of the disk: what is wrong with the content is a ValueError, and
    names the file."""
    try:
        data = Path(path).read_bytes()
    except MemoryError as error:
        raise ValueError(f"{path}: {_TOO_LARGE}") from error
    try:
        return decode(data)
    except MemoryError as error:
        raise ValueError(f"{path}: {_TOO_LARGE}") from error
    except ValueError as error:
        kind = type(error) if isinstance(error, FileError) else ValueError
        raise kind(f"{path}: {error}") from error
    except Exception as error:  # a damaged or hostile file may fail anywhere in the decoding
        raise DamagedFile(f"{path}: The file is damaged: {type(error).__name__}: {error}. Make it again.") from error


def read_npy(data: bytes) -> Any:
    """The one object in a .npy file: dicts, arrays (also of torch tensors), numbers and texts. Anything else raises."""
    shape, _, dtype, start = _header(data)
    if not dtype.hasobject or shape != ():
        raise FileError(f"The file holds a {dtype} array of shape {shape}, not a dict of arrays.")
    return unpickled(memoryview(data)[start:])


def read_npz(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file, by their names. What they expand to is known before they are expanded."""
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _refuse_more(sum(entry.file_size for entry in entries), data)
            arrays = {}
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise FileError(f"The file has the array {name!r} twice. Make it again.")
                if entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or entry.flag_bits & 1:
                    raise FileError(f"The array {name!r} is encrypted, or compressed as numpy does not. Make it again.")
                with archive.open(entry) as file:
                    arrays[name] = _array(file.read(entry.file_size))  # no more, whatever the entry expands to
            _refuse_more(4 * sum(array.size for array in arrays.values()), data)  # maps become float32
            return arrays
    except BadZipFile as error:
        raise unreadable(data, b"PK")(f"The file is cut off, or no .npz file: {error}. Make it again.") from error


def _refuse_more(size: int, data: bytes) -> None:
    if size > max(MOST_BYTES, len(data)):
        raise FileError(f"The file expands to {size:,} bytes. At most {MOST_BYTES:,} are read.")


def _array(data: bytes) -> npt.NDArray[Any]:
    shape, fortran, dtype, start = _header(data)
    if dtype.kind not in "fiub":
        raise FileError(f"The file holds a {dtype} array, and no pickle in it is read. Save numbers alone.")
    count = math.prod(shape)
    if len(data) - start < count * dtype.itemsize:  # a header may claim any shape
        raise DamagedFile(f"The file is cut off: an array of shape {shape} is not whole. Make it again.")
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, dtype, and where the content starts."""
    file = io.BytesIO(data[: _LONGEST_HEADER + 12])
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:
        kind, reason = unreadable(data, np.lib.format.MAGIC_PREFIX), str(error)[:100]
        raise kind(f"The file is cut off, or no .npy file: {reason}. Make it again.") from error
    check_sizes(shape)
    return shape, fortran, dtype, file.tell()
