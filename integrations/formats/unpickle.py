"""Reads the pickle of a numpy file, without running code from it.

Unpickling runs any function that the file names. Allowing only numpy's own constructors is not enough: a forged dtype
makes numpy read bytes as pointers. Nor is a list of names enough: a few hundred bytes can ask Python's unpickler for
hours or gigabytes, or set attributes on whatever the names stand for. So this module runs the instructions itself, and
knows only those that files of arrays need. The dozen names that they need resolve to small stand-ins, which accept
plain numbers, and texts as keys. Everything else is refused. What a file may cost is bounded by its own size and by the
limits below.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pickletools import opcodes
from typing import Any

import numpy as np
import numpy.typing as npt

from acr_reg.integrations.formats.files import DamagedFile, FileError, kind_of

# The limits of one file. The labels of COCO's 123,287 images take 3.7 million instructions.
MOST_INSTRUCTIONS = 10_000_000
MOST_BYTES = 2**31  # of arrays and texts, or the size of the file if that is more
DEEPEST = 6  # a dict in a dict has depth 2
LONGEST_TEXT = 1000  # of keys and of names, in characters


def unpickled(data: memoryview) -> Any:
    """The object in a pickle: dicts, arrays (also of torch tensors), numbers and texts. Anything else raises."""
    budget = _Budget(len(data))
    try:
        return _plain(_Machine(data, _NAMES, budget).run(), budget)
    except (FileError, MemoryError):
        raise
    except Exception as error:  # an instruction that finds something else on the stack than it needs
        raise DamagedFile(f"The file is damaged: {type(error).__name__}: {str(error)[:LONGEST_TEXT]}.") from error


class _Budget:
    """What is left of the limits. Values that the file refers to twice count twice, or a few bytes could hold 2^60."""

    def __init__(self, size: int) -> None:
        self.instructions, self.values, self.bytes = MOST_INSTRUCTIONS, size, max(size, MOST_BYTES)

    def take(self, values: int, size: int) -> None:
        self.values -= values
        self.bytes -= size
        if self.values < 0 or self.bytes < 0:
            raise FileError("The file holds far more than its own size: not read. Save each array once.")


def _plain(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """The pickle's content, with each stand-in replaced by its array."""
    if depth > 2 * DEEPEST:  # an array of objects that holds a dict is a level of its own
        raise FileError(f"The file holds more than {DEEPEST} levels of dicts or lists. Save one dict of arrays.")
    budget.take(1, 4 * value.size if isinstance(value, np.ndarray) else 0)  # maps become float32
    if isinstance(value, _Array):
        return _plain(value.value, budget, depth + 1)
    if isinstance(value, dict):
        return {key: _plain(item, budget, depth + 2) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, budget, depth + 2) for item in value]
    if value is None or isinstance(value, (bool, int, float, str, np.ndarray)):
        return value
    raise FileError(f"The file holds {kind_of(value)}. Only arrays, numbers and texts are read.")


# ---------------------------------------------------------------- instructions


class _Machine:
    """Runs pickles that stand one after another in ``data``."""

    def __init__(self, data: memoryview, names: dict[tuple[str, str], Any], budget: _Budget) -> None:
        self.data, self.at, self.names, self.budget = data, 0, names, budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object of the next pickle."""
        self.stack, self.marks, self.memo = [], [], {}
        for number in range(self.budget.instructions):
            code = self.byte()
            if code == _STOP:
                self.budget.instructions -= number
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                kind = FileError if code in _OF_PICKLES else DamagedFile  # of another file, or of none
                raise kind(f"The file holds the instruction {code:#04x}, which arrays do not need: not read.")
            step(self)
        raise FileError(f"The file holds more than {MOST_INSTRUCTIONS:,} pickle instructions. Split it.")

    def take(self, length: int) -> memoryview:
        end = self.at + length
        if end > len(self.data):
            raise DamagedFile(_CUT_OFF)
        part = self.data[self.at : end]
        self.at = end
        return part

    def byte(self) -> int:
        if self.at == len(self.data):
            raise DamagedFile(_CUT_OFF)
        self.at += 1
        return self.data[self.at - 1]

    def number(self, length: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(length), "little", signed=signed)

    def text(self, length: int) -> str:
        return str(self.take(length), "utf-8", "surrogatepass")

    def line(self) -> str:
        line = bytes(self.data[self.at : self.at + LONGEST_TEXT]).split(b"\n")[0]
        return str(self.take(len(line) + 1)[:-1], "utf-8")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedFile(f"The file names a function by {kind_of(name)}. Make it again.")
        found = self.names.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            full = f"{module}.{name}"[:LONGEST_TEXT]
            raise FileError(f"The file asks for {full}, which arrays do not need: not read.")
        self.stack.append(found)

    def call(self) -> None:
        function, arguments = self.last(2)
        if not callable(function):  # of all that can be on the stack, only the functions of this module are
            raise FileError(f"The file calls {kind_of(function)}: not read.")
        self.stack.append(function(self.budget, *arguments))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):  # else a file could change the functions of this module
            raise FileError(f"The file sets attributes of {kind_of(self.stack[-1])}: not read.")
        self.stack[-1].build(state)

    def refer(self) -> None:
        """("storage", type, key, device, length) announces the raw numbers of a torch tensor."""
        kind, code, *_ = self.stack.pop()
        if kind != "storage":
            raise FileError(f"The file refers to {kind_of(kind)}, which arrays do not need: not read.")
        self.stack.append(_Dtype(self.budget, code))

    def put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise FileError(f"The file sets items of {kind_of(target)}: not read.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Before it is hashed: the hash of a tuple visits all that the tuple holds.
            if type(key) not in (str, int, float, bool):
                raise FileError(f"The file has {kind_of(key)} as a key. Only texts and numbers are read.")
            if type(key) is str and len(key) > LONGEST_TEXT:
                raise FileError(f"The file has a key of {len(key)} characters. At most {LONGEST_TEXT} are read.")
            if key in target:
                raise FileError(f"The file has the key {key!r} twice. Make it again.")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise FileError(f"The file appends to {kind_of(self.stack[-1])}: not read.")
        self.stack[-1].extend(items)


_CUT_OFF = "The file is cut off: its pickle has no end. Make it again."
_STOP = ord(".")
_OF_PICKLES = {ord(opcode.code) for opcode in opcodes}
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # the protocol
    0x95: lambda m: m.take(8),  # the length of what follows
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.byte()),
    ord("M"): lambda m: m.stack.append(m.number(2)),
    ord("J"): lambda m: m.stack.append(m.number(4, signed=True)),
    0x8A: lambda m: m.stack.append(m.number(m.byte(), signed=True)),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    0x8C: lambda m: m.stack.append(m.text(m.byte())),
    ord("X"): lambda m: m.stack.append(m.text(m.number(4))),
    0x8D: lambda m: m.stack.append(m.text(m.number(8))),
    ord("C"): lambda m: m.stack.append(m.take(m.byte())),
    ord("B"): lambda m: m.stack.append(m.take(m.number(4))),
    0x8E: lambda m: m.stack.append(m.take(m.number(8))),
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.stack.append(tuple(m.since_mark())),
    0x85: lambda m: m.stack.append(tuple(m.last(1))),
    0x86: lambda m: m.stack.append(tuple(m.last(2))),
    0x87: lambda m: m.stack.append(tuple(m.last(3))),
    ord("]"): lambda m: m.stack.append([]),
    ord("a"): lambda m: m.append(m.last(1)),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): lambda m: m.put(m.last(2)),
    ord("u"): lambda m: m.put(m.since_mark()),
    ord("q"): lambda m: m.memo.__setitem__(m.byte(), m.stack[-1]),
    ord("r"): lambda m: m.memo.__setitem__(m.number(4), m.stack[-1]),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    ord("h"): lambda m: m.stack.append(m.memo[m.byte()]),
    ord("j"): lambda m: m.stack.append(m.memo[m.number(4)]),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.last(2)),
    ord("Q"): lambda m: m.refer(),
    ord("R"): lambda m: m.call(),
    ord("b"): lambda m: m.build(),
}


# ---------------------------------------------------------------- stand-ins

_FOREIGN_TYPE = "The file holds numbers of type {!r}. Only float and int are read."


class _Dtype:
    def __init__(self, budget: _Budget, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[fiub]\d\d?|U\d{1,4}|O8", code):
            raise FileError(_FOREIGN_TYPE.format(code[:LONGEST_TEXT]))
        self.dtype = np.dtype(code)

    def build(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise DamagedFile("The file holds numbers in an unknown order of bytes. Make it again.")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    value: Any = None

    def __init__(self, budget: _Budget, *_: Any) -> None:
        pass

    def build(self, state: tuple[Any, ...]) -> None:
        _, shape, declared, fortran, content = state
        check_sizes(shape)
        if declared.dtype == object:
            if shape != () or len(content) != 1:
                raise FileError(f"The file holds an array of objects of shape {shape}, not one dict.")
            self.value = content[0]
        elif declared.dtype.kind == "U":
            raise FileError(_FOREIGN_TYPE.format(declared.dtype.str[1:]))
        else:
            values = np.frombuffer(content, declared.dtype)
            self.value = values.reshape(shape, order="F" if fortran else "C")


def check_sizes(sizes: Any) -> None:
    """Before they reach numpy, where -1 has a meaning, or a message."""
    if type(sizes) is not tuple or len(sizes) > 32 or not all(type(size) is int and size >= 0 for size in sizes):
        raise DamagedFile("The file holds an array whose shape is not one. Make it again.")


def _scalar(budget: _Budget, declared: _Dtype, content: bytes) -> Any:
    if declared.dtype.kind == "U":  # a key from np.loadtxt; numpy would not check what the bytes stand for
        budget.take(0, len(content))
        encoding = "utf-32-be" if declared.dtype.str[0] == ">" else "utf-32-le"
        return str(content, encoding).rstrip("\0")
    return np.frombuffer(content, declared.dtype, count=1)[0].item()


def _latin1(budget: _Budget, text: str, encoding: str) -> bytes:
    budget.take(0, len(text))
    return text.encode("latin1")  # how protocol 2 stores bytes


class _Storage:
    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values = values


def _torch_storage(budget: _Budget, content: bytes) -> _Storage:
    """One torch storage in torch's old file format: five pickles, then its length and its numbers."""
    machine = _Machine(memoryview(content).cast("B"), _STORAGES, budget)
    _magic, _version, _system, declared, keys = (machine.run() for _ in range(5))
    if len(keys) != 1:
        raise FileError(f"One torch storage of the file holds {len(keys)} storages. Only 1 is read.")
    length = machine.number(8)
    return _Storage(np.frombuffer(machine.take(len(machine.data) - machine.at), declared.dtype, count=length))


def _torch_tensor(budget: _Budget, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> npt.NDArray[Any]:
    for sizes in ((offset,), size, stride):
        check_sizes(sizes)
    values, count = storage.values, math.prod(size)  # a tensor in place of its storage would have strides of its own
    if count > len(values):
        raise FileError(f"A tensor of size {size} is larger than its storage of {len(values)} numbers.")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and last >= len(values):  # a strided view itself checks no bounds
        raise FileError(f"A tensor of size {size} is out of bounds of its storage of {len(values)} numbers.")
    steps = tuple(step * values.itemsize if length > 1 else 0 for length, step in zip(size, stride, strict=True))
    return np.lib.stride_tricks.as_strided(values[offset:] if count else values[:0], size, steps, writeable=False)


# Codes, not dtypes: a dtype is one object for the whole process.
_STORAGES: dict[tuple[str, str], Any] = {
    ("torch", "FloatStorage"): "f4",
    ("torch", "DoubleStorage"): "f8",
    ("torch", "HalfStorage"): "f2",
    ("torch", "LongStorage"): "i8",
    ("torch", "IntStorage"): "i4",
}
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): lambda budget: {},
    ("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    ("torch.storage", "_load_from_bytes"): _torch_storage,
}
