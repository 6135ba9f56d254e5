"""Devices that are not there: tensors that say they lie on ``cuda:0``, ``cuda:1`` or ``mps``, with data on the CPU.

torch's FakeTensorMode has no data, so code that reads a value stops there. These tensors can be read, and
:class:`Traffic` counts how often that happens: on a GPU each read waits for everything queued before it.

torch itself takes them for tensors of the CPU, because its autograd engine asks a CUDA driver about tensors of CUDA.
Only Python sees the device: in ``tensor.device``, in ``device=`` and ``.to()``, and where operations meet here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from acr_reg._torch_private import body_of

CPU = torch.device("cpu")
# Operations after which the CPU waits for a value or a size. Of ``index`` and its like, only masks are read.
_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # take indices of the CPU
# Not tagged as pointwise, yet they too take a number that is a tensor of the CPU.
_TAKE_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "where", *_INDEX}
_CONSTRUCTORS = {  # what a caller makes lies where the caller says; what torch makes for itself lies where it is used
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.scalar_tensor, torch.empty, torch.zeros),
    *(torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm, torch.arange, torch.linspace),
    *(torch.eye, torch.tril_indices, torch.triu_indices, torch.empty_strided, torch.logspace, torch.complex),
}
_BACKWARD = {Tensor.backward, torch.autograd.grad}  # run functions of others, whose calls are seen as well
_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray}


class DeviceTensor(Tensor):
    """A tensor that claims to lie on ``device``; None: wherever it is used, as what torch makes within an operation."""

    inner: Tensor
    claimed: torch.device | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device | None) -> DeviceTensor:
        if device is not None and device.type == "mps" and inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"MPS has no {inner.dtype}. Use float32 instead.")
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
        )
        made.inner, made.claimed = inner, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.claimed if self.claimed is not None else torch.device("cuda", 0)

    is_cuda = property(lambda self: self.device.type == "cuda")
    is_mps = property(lambda self: self.device.type == "mps")
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return int(self.device.index)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return _to(self, CPU)

    def cuda(self, device: Any = 0, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return _to(self, torch.device("cuda", device) if isinstance(device, int) else device)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Move(torch.autograd.Function):
    """A copy from one device to another, and of its gradient back again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:  # type: ignore[override]
        ctx.back = tensor.device
        if tensor.device != CPU:
            Traffic.note("reads" if device == CPU else "copies", "to")
        elif device != CPU:
            Traffic.note("copies", "to")
        data = _inner(tensor).detach().clone()
        return data if device == CPU else DeviceTensor(data, device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _Move.apply(gradient, ctx.back), None


class Traffic:
    """What crossed the bus while this was entered: ``reads`` from a device and ``copies`` to it, each as the line of
    code that caused it. ``print(traffic)`` lists them."""

    _open: ClassVar[list[Traffic]] = []

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.copies: list[str] = []

    def __enter__(self) -> Traffic:
        Traffic._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Traffic._open.remove(self)

    @staticmethod
    def note(kind: str, operation: str) -> None:
        for traffic in Traffic._open:
            getattr(traffic, kind).append(f"{_line()} ({operation})")

    @property
    def counts(self) -> tuple[int, int]:
        """(reads, copies)."""
        return len(self.reads), len(self.copies)

    def __repr__(self) -> str:
        return "\n".join([*(f"read: {line}" for line in self.reads), *(f"copy: {line}" for line in self.copies)])


def _line() -> str:
    """The innermost line of the package or of a test; a backward has the line that started it."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and any(f"/{top}/" in path for top in ("acr_reg", "integrations", "tests", "benchmarks")):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown line"


def placed(device: Any) -> torch.device:
    """``cuda`` is ``cuda:0``, as where no other device was set."""
    device = torch.device(device)
    return CPU if device.type == "cpu" else torch.device(device.type, device.index or 0)


@cache
def _traits(func: Any) -> tuple[str, bool, bool]:
    """Its name, whether it takes numbers that are tensors of the CPU, and whether it draws random numbers."""
    name, tags = func.overloadpacket.__name__, func.tags
    return name, torch.Tag.pointwise in tags or name in _TAKE_NUMBERS, torch.Tag.nondeterministic_seeded in tags


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, _, draws = _traits(func)
    tensors = _tensors(args) if not kwargs else _tensors((*args, *kwargs.values()))
    device = _device_of(func, tensors, args, kwargs)
    if device is not None and device != CPU:
        _note_operation(name, args)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU, "pin_memory": False} if "pin_memory" in kwargs else {**kwargs, "device": CPU}
    # In torch 2.1 a mode for functions, such as that of a capture, would see this operation.
    with torch._C.DisableTorchFunction(), _Generators.drawing_on(device) if draws else nullcontext():
        result = func(*map(_inner, args), **{key: _inner(value) for key, value in kwargs.items()})
    return result if device == CPU or result is None else _outer(result, device, tensors)


class _Generators:
    """The random numbers of each device, which has a generator of its own."""

    states: ClassVar[dict[int, Tensor]] = {}

    @classmethod
    def get(cls, device: Any = 0) -> Tensor:
        return cls.states[device if isinstance(device, int) else torch.device(device).index or 0].clone()

    @classmethod
    def set(cls, state: Tensor, device: Any = 0) -> None:
        cls.states[device if isinstance(device, int) else torch.device(device).index or 0] = state.clone()

    @classmethod
    def seed_all(cls, seed: int) -> None:
        cls.states = {index: torch.Generator().manual_seed(seed).get_state() for index in range(2)}

    @classmethod
    @contextmanager
    def drawing_on(cls, device: torch.device | None) -> Iterator[None]:
        if device is None or device == CPU:
            yield
            return
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(cls.get(device))
        yield
        cls.set(torch.get_rng_state(), device)
        torch.set_rng_state(of_cpu)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _inner(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    return [_inner(each) for each in value] if isinstance(value, (list, tuple)) else value


def _outer(value: Any, device: torch.device | None, given: list[Tensor]) -> Any:
    """``value`` with its tensors on ``device``. What an operation returns of its arguments, as in place, stays that."""
    if isinstance(value, Tensor):
        same = (tensor for tensor in given if isinstance(tensor, DeviceTensor) and tensor.inner is value)
        found = next(same, None)
        return DeviceTensor(value, device) if found is None else found
    return type(value)(_outer(each, device, given) for each in value) if isinstance(value, (list, tuple)) else value


def _device_of(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> torch.device | None:
    """Where the result of an operation lies, None if wherever it is used. Raises for tensors of several devices."""
    name, takes_numbers, _ = _traits(func)
    if name == "copy_":
        return _claim(args[0])
    asked = kwargs.get("device")
    if asked is not None and placed(asked) != CPU:
        if name == "_to_copy" and _claim(args[0]) == CPU:
            Traffic.note("copies", name)
        return placed(asked)
    if name in _INDEX:
        of_cpu = {id(index) for index in args[1] if index is not None and _claim(index) == CPU}
        tensors = [tensor for tensor in tensors if id(tensor) not in of_cpu]
    claims = {_claim(tensor) for tensor in tensors}
    if len(claims) > 1:
        if takes_numbers:
            claims = {_claim(tensor) for tensor in tensors if tensor.ndim or _claim(tensor) != CPU}
        claims.discard(None)
    if len(claims) > 1:
        raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(map(str, claims)))}")
    if claims or tensors:
        return next(iter(claims), None)
    return None if _Functions.inside_operation() or _in_engine() else CPU


def _in_engine() -> bool:
    """Whether the autograd engine itself makes a tensor, such as zeros where ``unbind`` got no gradient."""
    frame: Any = sys._getframe(1)
    while frame is not None and any(way in frame.f_code.co_filename for way in (__file__, "_compile.py", "_dynamo")):
        frame = frame.f_back
    return frame is not None and "torch/autograd" in frame.f_code.co_filename


def _note_operation(name: str, args: Any) -> None:
    if name in _READS:
        Traffic.note("reads", name)
    if name == "copy_" and _claim(args[1]) == CPU and args[1].ndim:
        Traffic.note("copies", name)
    for index in args[1] if name in _INDEX else ():
        if index is not None and _claim(index) == CPU:
            Traffic.note("copies", name)
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            Traffic.note("reads", name)


def _claim(tensor: Tensor) -> torch.device | None:
    return tensor.claimed if isinstance(tensor, DeviceTensor) else CPU


class _Operations(TorchDispatchMode):
    """Sees what is made of no tensor that claims a device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports dynamo for it, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sends tensors of the CPU to devices, and remembers which function of torch was called."""

    _running: ClassVar[list[tuple[Any, Any, Any]]] = []

    @staticmethod
    def inside_operation() -> bool:
        """Whether what is made now is made by an operation on a device for itself, and lies where it is used."""
        func, args, kwargs = _Functions._running[-1] if _Functions._running else (torch.empty, (), {})
        given = _tensors((*args, *kwargs.values()))
        return func not in _CONSTRUCTORS and any(isinstance(each, DeviceTensor) for each in given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": placed(kwargs["device"])}
        if func is Tensor.cuda:
            return DeviceTensor.cuda(*args, **kwargs)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"device": args[0].device, **kwargs}
        if func in _FROM_VALUES:
            return _from_values(func, args, kwargs)
        if func in _BACKWARD:
            with self:
                return body_of(func)(*args, **kwargs)
        self._running.append((func, args, kwargs))
        try:
            found = func(*args, **kwargs)
        finally:
            self._running.pop()
        return _inner(found) if kwargs.get("device") == CPU else found  # made like a tensor of the device


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and placed(device) != tensor.device:
        tensor, copy = _Move.apply(tensor, placed(device)), False
    like = {} if memory_format is None else {"memory_format": memory_format}
    with torch._C.DisableTorchFunction():
        return Tensor.to(tensor, dtype=tensor.dtype if dtype is None else dtype, copy=copy, **like)


def _from_values(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    data = args[0] if args else kwargs.get("data")
    device, kwargs = kwargs.get("device"), {name: value for name, value in kwargs.items() if name != "device"}
    if isinstance(data, DeviceTensor):
        made: Tensor = data.detach() if func is torch.tensor else data
        return made.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype, copy=func is torch.tensor)
    made = func(*args, **kwargs)
    return made if device is None or device == CPU else _Move.apply(made, device)


def _autocast_of(init: Callable[..., None]) -> Callable[..., None]:
    def of_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type in ("cuda", "mps") else device_type, *args, **kwargs)

    return of_cpu


@contextmanager
def stand_in_devices() -> Iterator[torch.device]:
    """While entered, ``cuda:0`` and ``cuda:1`` serve for tensors, modules, autocast and random states. ``mps`` serves
    for tensors, except those of float64, which it refuses. Yields ``cuda:0``."""
    make_parameters_anew = torch.__future__.set_overwrite_module_params_on_conversion
    _Generators.seed_all(0)
    with ExitStack() as stack:
        for name, stand_in in {
            "torch.cuda._lazy_init": lambda *_: None,
            "torch.cuda.is_initialized": lambda: True,
            "torch.cuda.device_count": lambda: 2,
            "torch.cuda.get_rng_state": _Generators.get,
            "torch.cuda.set_rng_state": _Generators.set,
            "torch.cuda.manual_seed_all": _Generators.seed_all,
            "torch.autocast.__init__": _autocast_of(torch.autocast.__init__),
        }.items():
            stack.enter_context(patch(name, stand_in))
        # Else ``module.to`` writes the data into the parameter that is there, which stays a plain tensor.
        stack.callback(make_parameters_anew, False)
        make_parameters_anew(True)
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        yield torch.device("cuda", 0)
