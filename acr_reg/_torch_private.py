"""The only file that uses private names of torch, because no public name serves. Tested on torch 2.1 to 2.14.

``tests/project/test_torch_private.py`` fails by name if a new torch changes one of them.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain, compress, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch, checkpoint

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The class that all BatchNorm modules share."""

flex_attention_operator: Any = None
"""What flex_attention calls, on whichever device; None if torch has no flex_attention."""
with suppress(ImportError):
    from torch._higher_order_ops.flex_attention import flex_attention as _flex_attention

    flex_attention_operator = _flex_attention

_DISPATCHES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def dispatches(function: Any) -> bool:
    """Whether this Python function dispatches itself to modes once, as many of torch's own do."""
    return isinstance(function, types.FunctionType) and not set(_DISPATCHES).isdisjoint(function.__code__.co_names)


def body_of(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of a function without its dispatch to modes, which would hide the function's kernels from them."""
    never = dict.fromkeys(_DISPATCHES, lambda *_: False)
    body = types.FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def in_transform() -> bool:
    """Whether torch.vmap or a transform of torch.func runs this line: its tensors are of no use once it has ended."""
    return bool(torch._C._are_functorch_transforms_active())


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread, as when checkpointing recomputes a layer."""
    return backward_number() != -1


def backward_number() -> int:
    """The number of the backward that runs on this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


def in_reentrant_checkpoint() -> bool:
    """Whether torch.utils.checkpoint(use_reentrant=True) runs the calling code, without a graph."""
    code = checkpoint.CheckpointFunction.forward.__code__
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def function_modes() -> list[TorchFunctionMode]:
    """The modes of this thread's stack, innermost last."""
    return list(map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack())))


def keep_modes(modes: Sequence[TorchFunctionMode], kept: Sequence[bool]) -> None:
    """Removes modes of this thread's stack, wherever they stand: ``kept`` says for each of ``modes``, which are all of
    them, whether it stays."""
    first = kept.index(False)
    if first == len(modes) - 1:  # as in each layer
        torch._C._pop_torch_function_stack()
        return
    pops = islice(iter(torch._C._pop_torch_function_stack, None), len(modes) - first)
    pushes = map(torch._C._push_on_torch_function_stack, compress(modes[first:], kept[first:]))
    deque(chain(pops, pushes), 0)  # one step of C code, which no interruption divides


@contextmanager
def entered(mode: TorchFunctionMode) -> Iterator[None]:
    """Enters a mode for a block. The end takes off no other mode, as torch's own does once an interruption took off
    this one."""
    torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        take_off(mode)


def take_off(mode: TorchFunctionMode) -> None:
    """Removes a mode, its innermost entry alone, from this thread's stack, if it is there."""
    modes = function_modes()
    if mode in modes:
        last = len(modes) - 1 - modes[::-1].index(mode)
        keep_modes(modes, [place != last for place in range(len(modes))])


def remove_hooks(module: nn.Module, is_own: Callable[[Any], bool]) -> None:
    """Removes the module's own forward hooks. Their handles could be lost in an interruption."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in list(hooks.items()) if is_own(hook)]:
            for marks in _hook_marks(module):
                marks.pop(number, None)
            hooks.pop(number, None)  # last: by it an interrupted removal is found again


def _hook_marks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )


def math_kernel() -> AbstractContextManager[Any]:
    """Selects the SDPA kernel that can be differentiated twice."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch < 2.3
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
"""Whether torch.compile or torch.export is tracing this line. torch 2.1 has only the private function."""


def is_faked() -> bool:
    """Whether torch.compile runs this code on tensors without data (torch 2.1, under a function mode)."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    stack = _python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ == "FakeTensorMode" for mode in stack)


def never_traced(function: Any) -> Any:
    """Keeps torch.compile from tracing a function mode's handler, which may fail."""
    function._torchdynamo_disable = True
    return function


def never_compiled(function: Any) -> Any:
    """Keeps torch.compile, under which a function mode is called, from compiling the mode's handler and what it calls:
    its code for one function would serve another. A graph that is being traced still goes through the handler."""
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    elif hasattr(frames, "skip_code"):  # older torch, for the handler alone
        frames.skip_code(function.__code__)
    return function


def break_graph(why: str) -> None:
    """Ends the graph that is being traced, because torch swallows exceptions raised during tracing.

    If torch may not break the graph, its own error repeats ``why``.
    """
    if "msg" in torch._dynamo.graph_break.__code__.co_varnames:  # not in torch 2.1
        torch._dynamo.graph_break(msg=why)
    else:
        torch._dynamo.graph_break()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(module), module.compile() or a compiled forward hides this module's kernels from hooks."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = module.forward  # torch.compiler.disable sets the same mark, and one more
    if hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False):
        return True
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)


def children_of(module: nn.Module) -> tuple[nn.Module | None, ...]:
    """The registered children. nn.Module.children() is far slower, and this runs in each step."""
    return tuple(module._modules.values())


def replace_buffers(module: nn.Module, copy: Callable[[Tensor], Tensor]) -> None:
    """Gives the module ``copy`` of each buffer, in a new dict: vars(module) of before holds the old one."""
    module._buffers = {name: None if buffer is None else copy(buffer) for name, buffer in module._buffers.items()}


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module itself holds now; FSDP replaces them in the course of a forward."""
    for held in (module._parameters, module._buffers, vars(module)):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made this module, for one forward on one device."""
    return bool(getattr(module, "_is_replica", False))


def is_exported(module: nn.Module) -> bool:
    """Whether torch.export made this module, whose kernels are ATen operators that no function mode tells apart."""
    if not isinstance(module, torch.fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _distributed(name: str, *modules: str) -> type | None:
    """A class of torch.distributed, if its module was imported: before that nothing is of it, and importing is slow."""
    found = (getattr(sys.modules.get(f"torch.distributed.{module}"), name, None) for module in modules)
    return next(filter(None, found), None)


def _dtensor() -> type | None:
    return _distributed("DTensor", "tensor", "_tensor")  # torch < 2.5: _tensor


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def shards_parameters(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel or fully_shard gathers parameters of this model while it runs, or while a module
    runs that holds it."""
    if not _has_processes():
        return False
    kinds = (
        _distributed("FullyShardedDataParallel", "fsdp"),
        _distributed("FSDPModule", "fsdp", "_composable.fsdp"),  # torch < 2.6: _composable.fsdp
    )
    known = tuple(filter(None, kinds))
    found: list[nn.Module | None] = [model] if known else []
    for module in found:  # it grows; nn.Module.modules() is far slower, and this runs in each step
        if module is None:
            continue
        if isinstance(module, known) or "_is_fsdp_managed_module" in vars(module):
            return True
        if module._modules:
            found += module._modules.values()
    return False


def comes_from_shards(tensor: Tensor) -> bool:
    """Whether a module that FSDP shards, and trains, took part in making this tensor."""
    nodes, seen = [tensor.grad_fn] if _has_processes() else [], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        # What fully_shard puts on inputs, and the parameter in which FullyShardedDataParallel keeps all others.
        if node.name() == "RegisterPostBackwardFunctionBackward" or hasattr(
            getattr(node, "variable", None), "_is_flat_param"
        ):
            return True
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False


def has_dtensors() -> bool:
    """Whether there may be DTensors in this process."""
    return _has_processes() and _dtensor() is not None


def is_dtensor(tensor: Any) -> bool:
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def is_split(tensor: Any) -> bool:
    """Whether this is a DTensor of which each rank holds a part: a shard, or a summand."""
    return is_dtensor(tensor) and _splits(tensor.placements, tensor.device_mesh)


def _splits(placements: Any, mesh: Any) -> bool:
    return any(mesh.size(axis) > 1 and not placement.is_replicate() for axis, placement in enumerate(placements))


def comes_from_split(tensor: Tensor, seen: set[Any]) -> bool:
    """Whether DTensor.to_local() made this tensor of a part of a DTensor, with no whole DTensor on the way.

    So parallelize_module hands on what a split layer computes. Nodes of the graph in ``seen`` are passed over, and
    those visited join them.
    """
    todo: list[Any] = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        spec = getattr(node, "dtensor_spec", None)  # of _ToTorchTensor, whose context is the node
        if spec is None:
            todo += [before for before, _ in node.next_functions]
        elif _splits(spec.placements, spec.mesh):
            return True
    return False


def is_freed(tensor: Tensor) -> bool:
    """Whether a backward freed this tensor's graph, judged by the nearest nodes that saved anything.

    Nothing is unpacked or recomputed: hooks of checkpointing and offloading do not run. Within such hooks, which torch
    does not let us disable, the answer is False.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("only looking whether the graph is alive"):
            return _any_freed(tensor.grad_fn)
    except RuntimeError:
        return False


def _any_freed(node: Any) -> bool:
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        freed, kept = _saved(node)
        if freed:
            return True
        if not kept:
            todo += [before for before, _ in node.next_functions]
    return False


def _saved(node: Any) -> tuple[bool, bool]:
    """(whether a node's saved tensors are freed, whether it saved any)."""
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        try:
            saved = getattr(node, name if name == "_raw_saved_tensors" else name.removeprefix("_raw"))
        except RuntimeError as error:
            return "second time" in str(error), True
        if saved is not None and saved != ():
            return False, True
    return False, False


def store_of_process_group() -> Any:
    """The store in which the processes of the default process group met; None without a group, or without a store."""
    if not _has_processes():
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
