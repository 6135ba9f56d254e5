"""Files of class maps that weakly supervised segmentation codebases exchange, read without running code from them.

| format | one image's file holds | read by |
|---|---|---|
| ``psa`` | ``{k: float32 (H, W)}`` | evaluation of ACR, MCTformer, SEAM, TransCAM, CTI, WeakTr; PSA's infer_aff |
| ``psa_crf`` | ``{0: background, k + 1: float32 (H, W)}``, in each of two folders | PSA's training of AffinityNet |
| ``irn`` | ``{"keys": (n,), "cam": torch (n, ceil(H/4), ceil(W/4)), "high_res": (n, H, W)}`` | IRN, ToCo's evaluation |
| ``clip_es`` | ``{"keys": (n,), "attn_highres": float16 (n, H, W)}`` | CLIP-ES |
| ``npz`` | arrays under the names "k" | this library; holds no pickle |

k are 0-based classes, background not counted; (H, W) is the size of the original image. All but ``npz`` are ``.npy``
files that hold a pickle. A reader given another format than its own may score mIoU 0 without an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from acr_reg.integrations.formats.unpickle import read_npy
from acr_reg.integrations.formats.write import write_object, write_whole

__all__ = ["FORMATS", "Format", "cam_format", "load_cams", "save_cams", "save_crf_pair"]

Format = Literal["psa", "psa_crf", "irn", "clip_es", "npz"]
FORMATS: tuple[Format, ...] = get_args(Format)
Maps = dict[int, npt.NDArray[np.float32]]

ROUNDING = 1e-5  # how far resized maps may leave [0, 1]
IRN_STRIDE = 4
# How far a file may be from what a CRF pair holds and still be taken for one: half precision, over 20 classes.
_LIKE_A_CRF_FILE = 1e-2
_HIGHEST_ALPHA = 100.0


def save_cams(
    path: str | os.PathLike[str],
    cams: Mapping[int, npt.ArrayLike],
    format: Format | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Write the class maps of one image. The file appears whole or not at all; numpy 1 and 2 both open it.

    ``irn`` divides each map by its maximum, which IRN's thresholds expect; its ``cam`` averages the map over 4 x 4
    pixels. ``clip_es`` rounds to half precision, 0.0005 near 1.

    Args:
        path: ends in .npy, or .npz for the format ``npz``; its folder exists.
        cams: 0-based class (background not counted) -> (H, W) map in [0, 1]. Only the classes present; empty for an
            image without any (for which MCTformer's evaluation.py and its copies fail).
        format: of :data:`FORMATS`; by default ``psa`` for .npy and ``npz`` for .npz. For ``psa_crf``:
            :func:`save_crf_pair`.
        size: (H, W) of the original image, pixels. Maps of another size are resized to it, bilinearly, with pixel
            centres at half (antialiased when shrinking). By default the maps have it. ``irn`` and ``clip_es`` need it
            where there are no maps.

    Raises:
        ValueError: another ending or format, keys that are no class numbers, maps of unequal size or outside [0, 1].

    >>> import numpy as np
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
        if format == "irn":
            high_res, strided = _over_maximum(stacked), _over_maximum(_strided(stacked))
            write_object(content, {"keys": keys, "cam": strided, "high_res": high_res.numpy()})
        else:
            write_object(content, {"keys": keys, "attn_highres": stacked.numpy().astype(np.float16)})
    write_whole(path, content.getvalue())


def save_crf_pair(
    low: str | os.PathLike[str],
    high: str | os.PathLike[str],
    cams: Mapping[int, npt.ArrayLike],
    alphas: tuple[float, float] = (4.0, 32.0),
    size: tuple[int, int] | None = None,
    refine: Callable[[npt.NDArray[np.float32]], npt.ArrayLike] | None = None,
) -> None:
    """Write the two files of one image that PSA trains AffinityNet on: ``{0: background, k + 1: map of class k}``.

    The background is ``(1 - max_k M_k) ** alpha``. Foreground is trusted where it wins against the strong background
    of the low alpha, background where it wins even with the high one, and the rest is ignored. PSA refines both by a
    dense CRF first, which is not part of this library: pass it as ``refine``, or train on the maps as they are.

    Args:
        low, high: the files, .npy, of the same name in two folders that exist.
        cams, size: as for :func:`save_cams`. ``size`` is needed where there are no maps.
        alphas: of the low and the high file; PSA takes 4 and 32, SEAM 4 and 24, MCTformer and ACR 1 and 12.
        refine: given float32 (1 + n, H, W) in [0, 1], background first, returns the same shape, finite and >= 0.

    Raises:
        ValueError: as for :func:`save_cams`; alphas not 0 < low < high; another result of ``refine``.

    >>> import numpy as np
    >>> save_crf_pair("low.npy", "high.npy", {14: np.full((2, 3), 0.5)})
    >>> low, high = (np.load(name, allow_pickle=True).item() for name in ("low.npy", "high.npy"))
    >>> list(low), float(low[0][0, 0]), bool(high[0][0, 0] < 1e-9)
    ([0, 15], 0.0625, True)
    """
    if not 0 < alphas[0] < alphas[1] < float("inf"):
        raise ValueError(f"found alphas={alphas}; expected 0 < low < high; PSA takes (4, 32)")
    maps = _maps_to_write(cams, size)
    stacked = _stacked(maps, size).numpy()
    highest = stacked.max(axis=0, initial=0.0)
    contents = []
    for path, alpha in zip((low, high), alphas, strict=True):
        if Path(path).suffix != ".npy":
            raise ValueError(f"{path} ends in {Path(path).suffix!r}, expected .npy; name it after the image")
        scores = np.concatenate([((1 - highest) ** alpha)[None], stacked]).astype(np.float32)
        if refine is not None:
            scores = _refined(scores, np.asarray(refine(scores)))
        content = io.BytesIO()
        write_object(content, dict(zip([0, *(number + 1 for number in maps)], scores, strict=True)))
        contents.append(content.getvalue())
    # Both are made before one is written: no half of a pair stays behind where `refine` fails.
    for path, data in zip((low, high), contents, strict=True):
        write_whole(Path(path), data)


def load_cams(path: str | os.PathLike[str], format: Format | None = None) -> Maps:
    """Read the class maps of one image: 0-based class -> float32 (H, W). No code in the file is run.

    Reads every format of :func:`save_cams`, as written here or by the codebases, with numpy or torch numbers in them.
    Of ``irn`` this is ``high_res``; of ``psa_crf`` the maps without the background.

    Args:
        path: a .npy or .npz file.
        format: by default what the file says of itself. A file of a CRF pair looks like a PSA dict that has a class 0;
            one whose key 0 is a background of the others (a power of 1 minus the largest, or what is left of a sum of
            1) is refused unless this says which of the two it is.

    Raises:
        ValueError: another content; the message says what was found.
        FileNotFoundError: no such file.

    >>> import numpy as np
    >>> save_cams("image.npz", {14: np.eye(2)})
    >>> load_cams("image.npz")[14].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return _load(Path(path), format)[1]


def cam_format(path: str | os.PathLike[str]) -> Format:
    """Which of :data:`FORMATS` a file is in, as :func:`load_cams` finds it; raises where that does.

    >>> import numpy as np
    >>> save_cams("image.npy", {14: np.eye(2)}, "clip_es")
    >>> cam_format("image.npy")
    'clip_es'
    """
    return _load(Path(path), None)[0]


# ---------------------------------------------------------------- writing


def _format_to_write(path: Path, format: Format | None) -> Format:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .npy or .npz; name it after the image")
    if format is None:
        return "psa" if path.suffix == ".npy" else "npz"
    check_format(format)
    if format == "psa_crf":
        raise ValueError("found format='psa_crf' for one file; expected two; call save_crf_pair(low, high, cams)")
    expected = ".npz" if format == "npz" else ".npy"
    if path.suffix != expected:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected {expected} for format={format!r}; rename it")
    return format


def check_format(format: str | None) -> None:
    """Raises ValueError where the name is not of :data:`FORMATS`; None is left to be told."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"found format={format!r}; expected one of {', '.join(FORMATS)}; choose among those")


def _maps_to_write(cams: Mapping[int, npt.ArrayLike], size: tuple[int, int] | None) -> Maps:
    maps = _checked(cams)
    for number, values in maps.items():
        if values.size and not (values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING):  # NaN fails too
            raise ValueError(
                f"map of class {number} holds values from {values.min():.4g} to {values.max():.4g}, "
                "expected [0, 1]; normalise each map first"
            )
    if size is not None and min(size) < 1:
        raise ValueError(f"found size={size}; expected (H, W) of the image in pixels; pass its height, then its width")
    return {number: resize_map(np.clip(values, 0, 1), size) for number, values in maps.items()}


def resize_map(values: npt.NDArray[np.float32], size: tuple[int, int] | None) -> npt.NDArray[np.float32]:
    """One (h, w) map at (H, W): bilinear, pixel centres at half, antialiased when shrinking. None leaves it."""
    if size is None or values.shape == tuple(size):
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    resized = functional.interpolate(tensor, size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0, 0].clamp(0, 1).numpy()


def _stacked(maps: Maps, size: tuple[int, int] | None) -> torch.Tensor:
    """(n, H, W), also of no maps."""
    if not maps and size is None:
        raise ValueError(
            "found no maps and no size; expected the size of the image, which this format holds even without a class; "
            "pass size=(H, W), or images= where folders are converted"
        )
    if not maps:
        return torch.zeros(0, *size)  # type: ignore[misc]
    return torch.from_numpy(np.stack(list(maps.values())))


def _strided(maps: torch.Tensor) -> torch.Tensor:
    """(n, H, W) averaged over cells of 4 x 4 pixels. IRN enlarges this 4 times and cuts off what is beyond the image:
    cells lie at its upper left corner, and those on the far edges go on with the last pixel."""
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
            f"refine returned {_kind(refined)}; expected {scores.shape}, finite and not negative; return the "
            "probabilities in the order given"
        )
    return refined.astype(np.float32)


# ---------------------------------------------------------------- reading


def _load(path: Path, format: Format | None) -> tuple[Format, Maps]:
    check_format(format)
    try:
        if path.suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                content: Any = {int(name): archive[name] for name in archive.files}
            found: Format = "npz"
        elif path.suffix == ".npy":
            with open(path, "rb") as file:
                content = read_npy(file)
            found = _format_of(content, format)
        else:
            raise ValueError(f"ends in {path.suffix!r}, expected .npy or .npz; write the maps by save_cams")
        if format is not None and found != format:
            raise ValueError(f"found the format {found}, expected {format}; say format={found!r}, or leave it out")
        return found, _maps_of(content, found)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file may fail anywhere in the decoding
        raise ValueError(f"{path}: {error}") from error


def _format_of(content: Any, format: Format | None) -> Format:
    if isinstance(content, dict) and {"keys", "high_res"} <= content.keys():
        return "irn"
    if isinstance(content, dict) and {"keys", "attn_highres"} <= content.keys():
        return "clip_es"
    maps = _checked(content)
    if format == "psa_crf" and 0 not in maps:
        raise ValueError(f"found keys {list(maps)[:5]}, expected 0 (background) among them; a PSA dict has no such key")
    if format in ("psa", "psa_crf"):
        return format
    if _may_be_of_a_crf_pair(maps):
        raise ValueError(
            "found key 0 with a background of the other maps, which a file of a CRF pair holds, or a PSA dict whose "
            'class 0 happens to look so; expected one of them; say which by format="psa_crf" or format="psa" '
            "(evaluate --format, convert --from)"
        )
    return "psa"


def _may_be_of_a_crf_pair(maps: Maps) -> bool:
    """Whether key 0 holds what is left of 1 (after a CRF), or a power of 1 minus the largest of the others."""
    if 0 not in maps or not maps[0].size:
        return False
    if not all(values.min() >= -_LIKE_A_CRF_FILE and values.max() <= 1 + _LIKE_A_CRF_FILE for values in maps.values()):
        return False
    background = maps[0].astype(np.float64).clip(0, 1)
    others = [values.astype(np.float64).clip(0, 1) for number, values in maps.items() if number != 0]
    if np.abs(background + sum(others) - 1).max() < _LIKE_A_CRF_FILE:
        return True
    rest = 1 - np.max([np.zeros_like(background), *others], axis=0)
    # The alpha is read where the background is nearest to a half, and must then explain every other pixel.
    at = np.argmin(np.abs(background - 0.5) + 1e-3 * (1 - rest))
    base, value = rest.flat[at], background.flat[at].clip(1e-30, 1)
    alpha = np.log(value) / np.log(base) if 0 < base < 1 else 1.0
    return bool(0 < alpha < _HIGHEST_ALPHA and np.abs(background - rest**alpha).max() < _LIKE_A_CRF_FILE)


def _maps_of(content: Any, format: Format) -> Maps:
    if format in ("irn", "clip_es"):
        return _checked(_keyed(content, "high_res" if format == "irn" else "attn_highres"))
    maps = _checked(content)
    return {number - 1: values for number, values in maps.items() if number} if format == "psa_crf" else maps


def _keyed(content: dict[str, Any], name: str) -> dict[Any, Any]:
    """``{"keys": (n,), name: (n, H, W)}`` as a dict from class to map."""
    numbers, maps = np.asarray(content["keys"]), np.asarray(content[name])
    if numbers.ndim != 1 or maps.ndim != 3 or len(numbers) != len(maps) or len(set(numbers.tolist())) != len(numbers):
        raise ValueError(
            f"keys is {_kind(numbers)} and {name} {_kind(maps)}, expected (n,) of different classes and (n, H, W)"
        )
    numbers = numbers.astype(np.int64) if numbers.size == 0 else numbers
    return dict(zip(numbers.tolist(), maps, strict=True))


def _checked(cams: Mapping[Any, Any]) -> Maps:
    if not isinstance(cams, Mapping):
        raise ValueError(f"found {_kind(cams)}, expected a dict from class number to map; save it by save_cams")
    maps: Maps = {}
    for number, values in cams.items():
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)) or number < 0:
            found = list(cams)[:5]
            raise ValueError(
                f"found keys {found}, expected 0-based class numbers (PSA), keys and high_res (IRN), or keys and "
                "attn_highres (CLIP-ES); save the maps by save_cams"
            )
        array = np.asarray(values)
        if array.ndim != 2 or array.dtype.kind not in "fiub":
            raise ValueError(
                f"class {number} holds {_kind(array)}, expected a float (H, W) map; save one map per class"
            )
        maps[int(number)] = array.astype(np.float32)
    sizes = {number: array.shape for number, array in maps.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"maps differ in size: {sizes}; expected all at the size of the image; resize them before saving"
        )
    return maps


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
