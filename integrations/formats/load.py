"""Reads the class maps of one image, whichever format they are in, without running code from the file."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from acr_reg.integrations.formats.files import CAM_SUFFIXES, Arrays, Format, Maps, check_format, checked_arrays, kind_of
from acr_reg.integrations.formats.numpy_files import read_file, read_npy, read_npz
from acr_reg.integrations.formats.recognize import MAPS_OF, format_of

_NUMBER = re.compile(r"0|[1-9][0-9]*")


def load_cams(path: str | os.PathLike[str], format: Format | None = None) -> Maps:
    """Read the class maps of one image: 0-based class -> float32 (H, W). No code in the file is run.

    Reads every format of :data:`FORMATS`, written here or by the codebases, with numpy or torch numbers in it. ``irn``
    gives its ``high_res``, ``clip_es`` its ``attn_highres`` or else ``highres``, ``puzzle`` its ``hr_cam`` or else
    ``rw``, and ``psa_crf`` its maps without the background.

    Args:
        path: a .npy or .npz file.
        format: by default detected from the content. A file of a CRF pair looks like a PSA dict with a class 0. If
            key 0 looks like a background of the other maps (a power of 1 minus their maximum, or 1 minus their sum),
            the file is refused unless ``format`` names one of the two.

    Raises:
        ValueError: the content is something else; the message says what.
        FileNotFoundError: there is no such file.

    >>> import numpy as np
    >>> from acr_reg.integrations.formats import save_cams
    >>> save_cams("image.npz", {14: np.eye(2)})
    >>> load_cams("image.npz")[14].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return {number: values.astype(np.float32) for number, values in _load(Path(path), format)[1].items()}


def cam_format(path: str | os.PathLike[str]) -> Format:
    """Detect the format of a file, one of :data:`FORMATS`, as :func:`load_cams` does. Raises the same errors.

    >>> import numpy as np
    >>> from acr_reg.integrations.formats import save_cams
    >>> save_cams("image.npy", {14: np.eye(2)}, "clip_es")
    >>> cam_format("image.npy")
    'clip_es'
    """
    return _load(Path(path), None)[0]


def map_size(path: str | os.PathLike[str], format: Format) -> tuple[int, int] | None:
    """The (H, W) of the maps in a whole file of this format; None if it holds no map. Raises DamagedFile if the file is
    not whole, and otherwise as :func:`load_cams` does."""
    maps = _load(Path(path), format)[1]
    return next((values.shape for values in maps.values()), None)


def _load(path: Path, format: Format | None) -> tuple[Format, Arrays]:
    check_format(format)
    if path.suffix not in CAM_SUFFIXES:
        raise ValueError(
            f"{path}: The name ends in {path.suffix!r}. Class maps are .npy or .npz files: give one of these."
        )
    return read_file(path, partial(_decoded, format, path.suffix == ".npz"))


def _decoded(format: Format | None, zipped: bool, data: bytes) -> tuple[Format, Arrays]:
    content = _by_class(read_npz(data)) if zipped else read_npy(data)
    found = "npz" if zipped else format_of(content, format)
    if format is not None and found != format:
        raise ValueError(f"The file is in the format {found}, not {format}. Say {found}, or leave the format out.")
    return found, _maps_of(content, found)


def _by_class(arrays: dict[str, Any]) -> dict[Any, Any]:
    """By number, where the name is one as save_cams writes it: 14, but not 014 or +14, which mean the same to int()."""
    return {int(name) if _NUMBER.fullmatch(name) else name: values for name, values in arrays.items()}


def _maps_of(content: Any, format: Format) -> Arrays:
    if format in MAPS_OF:
        maps = checked_arrays(_keyed(content, format))
    else:
        maps = checked_arrays(content)
    return {number - 1: values for number, values in maps.items() if number} if format == "psa_crf" else maps


def _keyed(content: dict[str, Any], format: Format) -> dict[Any, Any]:
    """``{"keys": (n,), name: (n, H, W)}`` as a dict from class to map."""
    name = next(name for name in MAPS_OF[format] if name in content)
    numbers, maps = np.asarray(content["keys"]), np.asarray(content[name])
    if format == "puzzle":
        if numbers.ndim != 1 or numbers[:1].tolist() != [0]:
            raise ValueError(f"keys is {numbers.tolist()}, and Puzzle-CAM begins with the background's 0. Add it.")
        numbers = numbers[1:] - 1
    if numbers.ndim != 1 or maps.ndim != 3 or len(numbers) != len(maps) or len(set(numbers.tolist())) != len(numbers):
        raise ValueError(
            f"keys is {kind_of(numbers)} and {name} is {kind_of(maps)}. Store n different classes and (n, H, W) maps."
        )
    numbers = numbers.astype(np.int64) if numbers.size == 0 else numbers
    return dict(zip(numbers.tolist(), maps, strict=True))
