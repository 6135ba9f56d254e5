"""Reads a numpy file that holds a pickle, without running code from it.

Unpickling runs any function that the file names. Allowing only numpy's own constructors is not enough: a forged dtype
makes numpy read bytes as pointers. So the dozen names that files of class maps need resolve to small stand-ins in this
module, which accept plain numbers, and texts as keys. Every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


def read_npy(file: BinaryIO) -> Any:
    """The one object in a .npy file: dicts, arrays (also of torch tensors), numbers and texts. Anything else raises."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except ValueError as error:
        raise ValueError(f"The file is cut off, or no .npy file: {error}. Make it again.") from error
    if not dtype.hasobject or shape != ():
        raise ValueError(f"The file holds a {dtype} array of shape {shape}, not a dict of arrays.")
    try:
        content = _plain(_Reader(file).load())
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"The file is cut off or damaged: {error}. Make it again.") from error
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content


class _Reader(pickle.Unpickler):
    """Unpickles dicts of arrays. Every name in the file resolves to something in this module, or is refused."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = _NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if module == "torch":
            found = _STORAGES.get(name)
        if found is None:
            raise ValueError(f"The file asks for {module}.{name}, which arrays do not need: not read.")
        return found

    def persistent_load(self, pid: Any) -> Any:
        kind, code, *_ = pid  # ("storage", type, key, device, length) announces the raw numbers of a torch tensor
        if kind != "storage":
            raise ValueError(f"The file refers to {kind!r}, which arrays do not need: not read.")
        return _Dtype(code)


_FOREIGN_TYPE = "The file holds numbers of type {!r}. Only float and int are read."


class _Dtype:
    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[fiub]\d\d?|U\d{1,4}|O8", code):
            raise ValueError(_FOREIGN_TYPE.format(code))
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, declared, fortran, content = state
        if declared.dtype == object:
            if shape != () or len(content) != 1:
                raise ValueError(f"The file holds an array of objects of shape {shape}, not one dict.")
            self.value = content[0]
        elif declared.dtype.kind == "U":
            raise ValueError(_FOREIGN_TYPE.format(declared.dtype.str[1:]))
        else:
            values = np.frombuffer(content, declared.dtype)
            self.value = values.reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """The pickle's content, with each stand-in replaced by its array."""
    if isinstance(value, _Array):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _scalar(declared: _Dtype, content: bytes) -> Any:
    if declared.dtype.kind == "U":  # a key from np.loadtxt; numpy would not check what the bytes stand for
        return content.decode("utf-32-be" if declared.dtype.str[0] == ">" else "utf-32-le").rstrip("\0")
    return np.frombuffer(content, declared.dtype)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how protocol 2 stores bytes


def _torch_storage(content: bytes) -> npt.NDArray[Any]:
    """One torch storage in torch's old file format: five pickles, then its length and its numbers."""
    file = io.BytesIO(content)
    _magic, _version, _system, declared, keys = (_Reader(file).load() for _ in range(5))
    if len(keys) != 1:
        raise ValueError(f"One torch storage of the file holds {len(keys)} storages. Only 1 is read.")
    length = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(), declared.dtype, count=length)


def _torch_tensor(storage: npt.NDArray[Any], offset: int, size: Any, stride: Any, *_: Any) -> npt.NDArray[Any]:
    if math.prod(size) > len(storage):
        raise ValueError(f"A tensor of size {size} is larger than its storage of {len(storage)} numbers.")
    index = np.full(size, offset)  # indexing checks the storage's bounds; a strided view does not
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
# Codes, not dtypes: the file can change whatever find_class returns, and would change a dtype in place.
_STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4"}
