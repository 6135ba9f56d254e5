"""Writes the class maps of one image, in the format that the next stage reads."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from acr_reg.integrations.formats.files import Format, Maps, check_format, checked_maps, kind_of
from acr_reg.integrations.formats.write import replacing, write_object

ALPHAS = (4.0, 32.0)  # PSA's own
ROUNDING = 1e-5  # how far resized maps may leave [0, 1]
IRN_STRIDE = 4


def save_cams(
    path: str | os.PathLike[str],
    cams: Mapping[int, npt.ArrayLike],
    format: Format | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Write the class maps of one image. The file appears whole or not at all. numpy 1 and 2 both open it.

    ``irn`` and ``puzzle`` divide each map by its maximum, as their readers' thresholds expect, and their ``cam``
    averages the map over 4 x 4 pixels. ``clip_es`` rounds to half precision (0.0005 near 1).

    Args:
        path: ends in .npy, or in .npz for the format ``npz``. Its folder must exist.
        cams: 0-based class (background not counted) -> (H, W) map in [0, 1]. Give the classes present only, and {} for
            an image without any (MCTformer's evaluation.py and its copies fail on such a file).
        format: one of :data:`FORMATS`; by default ``psa`` for .npy and ``npz`` for .npz. For ``psa_crf`` call
            :func:`save_crf_pair`.
        size: (H, W) of the original image in pixels. Maps of another size are resized to it: bilinearly, with pixel
            centres at half, antialiased when shrinking. By default the maps keep their size. ``irn``, ``clip_es``
            and ``puzzle`` need ``size`` if there are no maps.

    Raises:
        ValueError: the ending or format is unknown, a key is not a class, or maps differ in size or leave [0, 1].

    >>> import numpy as np
    >>> from acr_reg.integrations.formats import cam_format, load_cams
    >>> save_cams("image.npy", {14: np.eye(6, 8), 2: np.ones((6, 8))}, "irn")
    >>> cam_format("image.npy"), {k: m.shape for k, m in load_cams("image.npy").items()}
    ('irn', {14: (6, 8), 2: (6, 8)})
    """
    path = Path(path)
    format = _format_to_write(path, format)
    maps = _maps_to_write(cams, size)
    content = io.BytesIO()
    if format == "npz":
        arrays: dict[str, Any] = {str(number): values for number, values in maps.items()}
        np.savez_compressed(content, **arrays)
    elif format == "psa":
        write_object(content, maps)
    else:
        keys = np.array(list(maps), dtype=np.int64)
        stacked = _stacked(maps, size)
        if format == "clip_es":
            write_object(content, {"keys": keys, "attn_highres": stacked.numpy().astype(np.float16)})
        else:
            high_res, strided = _over_maximum(stacked).numpy(), _over_maximum(_strided(stacked))
            if format == "irn":
                write_object(content, {"keys": keys, "cam": strided, "high_res": high_res})
            else:
                write_object(content, {"keys": np.pad(keys + 1, (1, 0)), "cam": strided, "hr_cam": high_res})
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.getvalue())


def save_crf_pair(
    low: str | os.PathLike[str],
    high: str | os.PathLike[str],
    cams: Mapping[int, npt.ArrayLike],
    alphas: tuple[float, float] = ALPHAS,
    size: tuple[int, int] | None = None,
    refine: Callable[[npt.NDArray[np.float32]], npt.ArrayLike] | None = None,
) -> None:
    """Write the two files of one image that PSA trains AffinityNet on: ``{0: background, k + 1: map of class k}``.

    The background is ``(1 - max_k M_k) ** alpha``. AffinityNet trusts a foreground pixel that wins against the strong
    background of the low alpha, and a background pixel that wins even with the high alpha; it ignores the rest. PSA
    first refines both files by a dense CRF, which this library does not have: pass one as ``refine``, or train on the
    maps as they are.

    Args:
        low, high: two .npy files of the same name, in two folders that exist.
        cams, size: as for :func:`save_cams`. ``size`` is needed if there are no maps.
        alphas: for the low and the high file. PSA uses 4 and 32, SEAM 4 and 24, MCTformer and ACR 1 and 12.
        refine: takes float32 (1 + n, H, W) in [0, 1], background first; returns the same shape, finite and >= 0.

    Raises:
        ValueError: as for :func:`save_cams`; alphas are not 0 < low < high; ``refine`` returns something else.

    >>> import numpy as np
    >>> save_crf_pair("low.npy", "high.npy", {14: np.full((2, 3), 0.5)})
    >>> low, high = (np.load(name, allow_pickle=True).item() for name in ("low.npy", "high.npy"))
    >>> list(low), float(low[0][0, 0]), bool(high[0][0, 0] < 1e-9)
    ([0, 15], 0.0625, True)
    """
    check_alphas(alphas)
    maps = _maps_to_write(cams, size)
    stacked = _stacked(maps, size).numpy()
    highest = stacked.max(axis=0, initial=0.0)
    contents = []
    for path, alpha in zip((low, high), alphas, strict=True):
        if Path(path).suffix != ".npy":
            raise ValueError(f"{path} ends in {Path(path).suffix!r}. Name the file after the image, with .npy.")
        scores = np.concatenate([((1 - highest) ** alpha)[None], stacked]).astype(np.float32)
        if refine is not None:
            scores = _refined(scores, np.asarray(refine(scores)))
        content = io.BytesIO()
        write_object(content, dict(zip([0, *(number + 1 for number in maps)], scores, strict=True)))
        contents.append(content.getvalue())
    # Both are made before either is written, so that half a pair never stays behind if `refine` fails.
    for path, data in zip((low, high), contents, strict=True):
        with replacing(Path(path)) as unfinished:
            unfinished.write_bytes(data)


def check_alphas(alphas: tuple[float, float]) -> None:
    """Raises ValueError unless 0 < low < high."""
    if not 0 < alphas[0] < alphas[1] < float("inf"):
        raise ValueError(f"alphas={alphas} do not satisfy 0 < low < high. PSA uses {ALPHAS}.")


def _format_to_write(path: Path, format: Format | None) -> Format:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path} ends in {path.suffix!r}. Name the file after the image, with .npy or .npz.")
    if format is None:
        return "psa" if path.suffix == ".npy" else "npz"
    check_format(format)
    if format == "psa_crf":
        raise ValueError("The format psa_crf takes two files. Call save_crf_pair(low, high, cams).")
    expected = ".npz" if format == "npz" else ".npy"
    if path.suffix != expected:
        raise ValueError(f"{path} ends in {path.suffix!r}, and format={format!r} needs {expected}. Rename the file.")
    return format


def _maps_to_write(cams: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> Maps:
    maps = checked_maps(cams)
    for number, values in maps.items():
        if np.isnan(values).any():
            raise ValueError(f"The map of class {number} has NaN. Check how it is normalised: 0 / 0 in an empty map?")
        if values.size and not (values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING):
            raise ValueError(
                f"The map of class {number} holds values from {values.min():.4g} to {values.max():.4g}. They must lie "
                "in [0, 1]: normalise each map first."
            )
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} is not the (H, W) of an image in pixels. Pass its height, then its width.")
    return {number: resize_map(np.clip(values, 0, 1), size) for number, values in maps.items()}


def resize_map(values: npt.NDArray[np.float32], size: tuple[int, int] | None) -> npt.NDArray[np.float32]:
    """One (h, w) map at (H, W): bilinear, pixel centres at half, antialiased when shrinking. None leaves it."""
    if size is None or values.shape == tuple(size):
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    resized = functional.interpolate(tensor, size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0, 0].clamp(0, 1).numpy()


def _stacked(maps: Maps, size: tuple[int, int] | None) -> torch.Tensor:
    """(n, H, W), even if there are no maps."""
    if not maps and size is None:
        raise ValueError(
            "There are no maps to take the size from. Pass size=(H, W), or images= (--images) to convert a folder."
        )
    if not maps:
        return torch.zeros(0, *size, device="cpu")  # type: ignore[misc]
    return torch.from_numpy(np.stack(list(maps.values())))


def _strided(maps: torch.Tensor) -> torch.Tensor:
    """(n, H, W) averaged over cells of 4 x 4 pixels. IRN enlarges this 4 times and crops it to the image, so the cells
    start at the upper left corner, and the cells on the far edges repeat the last pixel."""
    if len(maps) == 0:
        return maps.new_zeros(0, *(-(-length // IRN_STRIDE) for length in maps.shape[1:]))
    below, right = (-length % IRN_STRIDE for length in maps.shape[1:])
    padded = functional.pad(maps[None], (0, right, 0, below), mode="replicate")
    return functional.avg_pool2d(padded, IRN_STRIDE)[0]


def _over_maximum(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.flatten(1).amax(1).clamp_min(torch.finfo(maps.dtype).tiny)[:, None, None] if len(maps) else maps


def _refined(scores: npt.NDArray[np.float32], refined: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if refined.shape != scores.shape or not np.isfinite(refined).all() or (refined < 0).any():
        raise ValueError(
            f"refine returned {kind_of(refined)}. Return probabilities of shape {scores.shape}, finite and not "
            "negative, in the order given."
        )
    return refined.astype(np.float32)
