"""Defines the file formats of class maps that weakly supervised segmentation codebases exchange.

| format | one image's file holds | read by |
|---|---|---|
| ``psa`` | ``{k: float32 (H, W)}`` | evaluation of ACR, MCTformer, SEAM, TransCAM, CTI, WeakTr; PSA's infer_aff |
| ``psa_crf`` | ``{0: background, k + 1: float32 (H, W)}``, in each of two folders | PSA's training of AffinityNet |
| ``irn`` | ``{"keys": (n,), "cam": torch (n, ceil(H/4), ceil(W/4)), "high_res": (n, H, W)}`` | IRN, ToCo's evaluation |
| ``clip_es`` | ``{"keys": (n,), "attn_highres": float16 (n, H, W)}``, or ``highres`` before refinement | CLIP-ES |
| ``npz`` | arrays under the names "k" | this library; holds no pickle |
| ``puzzle`` | ``{"keys": (1 + n,), "cam": as in irn, "hr_cam": (n, H, W)}``, or ``rw`` after random walk | Puzzle-CAM |

k is a 0-based class number (the background is not counted), and (H, W) is the size of the original image. The keys of
``puzzle`` are 0 for the background, which has no map, and k + 1. All but ``npz`` are ``.npy`` files that hold a pickle.
A reader given a format that is not its own may score mIoU 0 without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from acr_reg.metrics import as_array

Format = Literal["psa", "psa_crf", "irn", "clip_es", "npz", "puzzle"]
IGNORED = 255  # the id of unknown pixels in masks and label maps, so that no class may have it

FORMATS: tuple[Format, ...] = get_args(Format)
Maps = dict[int, npt.NDArray[np.float32]]
Arrays = dict[int, npt.NDArray[Any]]

CAM_SUFFIXES = (".npy", ".npz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jp2")  # in any case


class FileError(ValueError):
    """A file that is not read. The message says why."""


class DamagedFile(FileError):
    """A file that was whole once."""


def unreadable(data: bytes, magic: bytes) -> type[FileError]:
    """The error for content that should begin with ``magic``. A disk that lost power, or a copy that was broken off,
    leaves a beginning or zeros; anything else is a file of another kind, which nobody replaces."""
    is_rest = data.startswith(magic) or magic.startswith(data) or not data.strip(b"\0")
    return DamagedFile if is_rest else FileError


def check_format(format: str | None) -> None:
    """Raises ValueError for a name that is not in :data:`FORMATS`. None passes: the format is detected later."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {', '.join(FORMATS)}.")


def checked_maps(cams: Mapping[Any, Any]) -> Maps:
    """Converts ``cams`` to float32 (H, W) maps of one size. Raises ValueError if that is impossible."""
    return {number: values.astype(np.float32) for number, values in checked_arrays(cams).items()}


def checked_arrays(cams: Mapping[Any, Any]) -> Arrays:
    """``cams`` as arrays that :func:`checked_maps` can convert; what a file holds is not copied."""
    if not isinstance(cams, Mapping):
        raise ValueError(f"Class maps come as {{class: (H, W) map}}, not as {kind_of(cams)}. Make such a dict.")
    maps: Arrays = {}
    for number, values in cams.items():
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)) or number < 0:
            raise ValueError(
                f"The keys are {list(cams)[:5]}, not 0-based class numbers. IRN dicts have keys and high_res, CLIP-ES "
                "dicts keys and attn_highres."
            )
        array = as_array(values)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiub":
            raise ValueError(f"Class {number} holds {kind_of(array)}. Give each class one (H, W) map of numbers.")
        maps[int(number)] = array
    sizes = {number: array.shape for number, array in maps.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The maps differ in size: {sizes}. Resize them all to the size of the image.")
    return maps


def files_by_id(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each ID, sorted: those with one of the suffixes, in capitals or not."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and path.is_file():
            files.setdefault(path.stem, []).append(path)
    return files


def kind_of(value: Any) -> str:
    """Names the type (for arrays: and shape) of a value, for messages."""
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
