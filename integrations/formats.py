"""Files of class maps that weakly supervised segmentation codebases exchange, read without running code from them.

The formats are numpy files that hold a pickle, and unpickling runs whatever the file names. Naming only numpy's own
constructors is not enough: a forged dtype makes numpy read bytes as pointers. So the reader here resolves the dozen
names such files need to small stand-ins of its own, which accept plain numbers only, and refuses every other name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import numpy.typing as npt

__all__ = ["load_cams", "save_cams"]

Maps = dict[int, npt.NDArray[np.float32]]
ROUNDING = 1e-5  # how far resized maps may leave [0, 1]


def save_cams(path: str | os.PathLike[str], cams: Mapping[int, npt.ArrayLike]) -> None:
    """Write the class maps of one image.

    ``.npy`` is the PSA dict ``{class: float32 (H, W)}``, pickled, which PSA's affinity step and the evaluation
    scripts of ACR, MCTformer, SEAM, TransCAM and WeakTr read; numpy 1 and 2 both open it. ``.npz`` holds the same
    maps under their class number as key, without a pickle. The file appears whole or not at all.

    Args:
        path: ends in .npy or .npz; its folder exists.
        cams: 0-based class (background not counted) -> (H, W) map in [0, 1] at the size of the original image. Only
            the classes present; empty for an image without any.

    Raises:
        ValueError: another ending, keys that are no class numbers, maps of unequal size or outside [0, 1].
    """
    path = Path(path)
    maps = _checked(cams)
    for number, values in maps.items():
        if values.size and not (values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING):  # NaN fails too
            raise ValueError(
                f"map of class {number} holds values from {values.min():.4g} to {values.max():.4g}, "
                "expected [0, 1]; normalise each map first"
            )
    content = io.BytesIO()
    if path.suffix == ".npy":
        _write_psa(content, maps)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {str(number): values for number, values in maps.items()}
        np.savez_compressed(content, **arrays)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .npy (PSA dict) or .npz")

    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        unfinished.write_bytes(content.getvalue())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_cams(path: str | os.PathLike[str]) -> Maps:
    """Read the class maps of one image: 0-based class -> float32 (H, W). No code in the file is run.

    Reads ``.npz`` and ``.npy`` of `save_cams`, PSA dicts from elsewhere, and IRN dicts (``keys`` and ``high_res``,
    with or without the torch tensors IRN leaves in them).

    Raises:
        ValueError: another content; the message says what was found.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                content: Any = {int(name): archive[name] for name in archive.files}
        elif path.suffix == ".npy":
            with open(path, "rb") as file:
                content = _read_npy(file)
        else:
            raise ValueError(f"ends in {path.suffix!r}, expected .npy or .npz; write the maps by save_cams")
        return _checked(_from_irn(content))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file may fail anywhere in the decoding
        raise ValueError(f"{path}: {error}") from error


def _checked(cams: Mapping[Any, Any]) -> Maps:
    if not isinstance(cams, Mapping):
        raise ValueError(f"found {_kind(cams)}, expected a dict from class number to map; save it by save_cams")
    maps: Maps = {}
    for number, values in cams.items():
        if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)) or number < 0:
            found = list(cams)[:5]
            raise ValueError(f"found keys {found}, expected 0-based class numbers (PSA), or keys and high_res (IRN)")
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


def _from_irn(content: Any) -> Any:
    """``{"keys": (n,), "high_res": (n, H, W)}`` as a dict from class to map; anything else as it is."""
    if not isinstance(content, dict) or not {"keys", "high_res"} <= content.keys():
        return content
    numbers, maps = np.asarray(content["keys"]), np.asarray(content["high_res"])
    if numbers.ndim != 1 or len(numbers) != len(maps):
        raise ValueError(f"keys is {_kind(numbers)} and high_res {_kind(maps)}, expected (n,) and (n, H, W)")
    return dict(zip(numbers.tolist(), maps, strict=True))


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"


def _write_psa(file: BinaryIO, maps: Maps) -> None:
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    # numpy 2 writes names under numpy._core, which numpy 1 (codebases of the torch 1.7 era) cannot import; the old
    # names work in both. In pickle protocol 3 names are lines of text, so replacing them leaves the rest intact.
    data = pickle.dumps(np.array(maps, dtype=object), protocol=3)
    file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def _read_npy(file: BinaryIO) -> Any:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if not dtype.hasobject or shape != ():
        raise ValueError(f"found a {dtype} array of shape {shape}, expected a dict from class number to map")
    content = _plain(_Reader(file).load())
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content


class _Reader(pickle.Unpickler):
    """Unpickles dicts of arrays; every name in the file resolves to something of this module, or is refused."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = _NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if module == "torch":
            found = _STORAGES.get(name)
        if found is None:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which class maps do not need; not read")
        return found

    def persistent_load(self, pid: Any) -> Any:
        kind, code, *_ = pid  # ("storage", type, key, device, length): where torch announces raw numbers
        if kind != "storage":
            raise pickle.UnpicklingError(f"the file refers to {kind!r}; not read")
        return _Dtype(code)


class _Dtype:
    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[fiub]\d\d?|O8", code):
            raise pickle.UnpicklingError(f"found numbers of type {code!r}, expected float or int")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, declared, fortran, content = state
        if declared.dtype == object:
            if shape != () or len(content) != 1:
                raise pickle.UnpicklingError(f"found an array of objects of shape {shape}, expected a dict of maps")
            self.value = content[0]
        else:
            values = np.frombuffer(content, declared.dtype)
            self.value = values.reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """The pickle's content with arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _scalar(declared: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, declared.dtype)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how protocol 2 stores bytes


def _torch_storage(content: bytes) -> npt.NDArray[Any]:
    """One torch storage in torch's old file format: five pickles, then its length and its numbers."""
    file = io.BytesIO(content)
    _magic, _version, _system, declared, keys = (_Reader(file).load() for _ in range(5))
    if len(keys) != 1:
        raise pickle.UnpicklingError(f"found {len(keys)} torch storages in one, expected 1")
    length = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(), declared.dtype, count=length)


def _torch_tensor(storage: npt.NDArray[Any], offset: int, size: Any, stride: Any, *_: Any) -> npt.NDArray[Any]:
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError(f"found a torch tensor of size {size} in a storage of {len(storage)} numbers")
    index = np.full(size, offset)  # indexing is checked against the storage, a strided view would not be
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        index += np.arange(length).reshape(-1, *[1] * (len(size) - axis - 1)) * step
    return storage[index]


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    ("torch.storage", "_load_from_bytes"): _torch_storage,
}
# Codes, not dtypes: what find_class returns is in the hands of the file, which could change a dtype in place.
_STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4"}
