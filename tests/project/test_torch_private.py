"""What acr_reg/_torch_private.py uses of torch that is private: one test each, which says what to look at where a new
torch changed it; and that no other file does."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode
from torch.utils.checkpoint import checkpoint

from acr_reg import _torch_private as private
from tests.support.paths import ROOT

ROOT = ROOT / "acr_reg"


@pytest.fixture(autouse=True)
def _seed_and_clean_up() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    while _len_torch_function_stack():
        _pop_mode()


def changed(name: str, look_at: str) -> str:
    """What every test here says where it fails."""
    return f"torch {torch.__version__} changed {name}: look at {look_at}, then at acr_reg/_torch_private.py"


# ---- nn.MultiheadAttention


class Seen(TorchFunctionMode):
    """The functions that a mode is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_body_is_the_public_function(need_weights: bool) -> None:
    public, body = F.multi_head_attention_forward, private.body_of(F.multi_head_attention_forward)
    note = changed("F.multi_head_attention_forward", "whether it is plain Python that asks has_torch_function once")
    assert inspect.signature(body).parameters.keys() == inspect.signature(public).parameters.keys(), note
    defaults = [[p.default for p in inspect.signature(f).parameters.values()] for f in (body, public)]
    assert defaults[0] == defaults[1], note
    assert private.dispatches(public), note
    assert "handle_torch_function" in public.__code__.co_names, note

    module, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    arguments = (
        *(x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0),
        *(module.out_proj.weight, module.out_proj.bias),
    )
    expected = public(*arguments, training=True, need_weights=need_weights)
    seen = Seen()
    with seen:
        found = body(*arguments, training=True, need_weights=need_weights)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), note
    kernel = "softmax" if need_weights else "scaled_dot_product_attention"
    assert kernel in seen.names, note
    assert "multi_head_attention_forward" not in seen.names, note


def test_flex_attention_operator_is_what_flex_attention_calls() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="torch < 2.5 has no flex_attention")
    note = changed("torch._higher_order_ops.flex_attention", "what torch.nn.attention.flex_attention calls in the end")
    assert private.flex_attention_operator is not None, note
    assert private.flex_attention_operator in flex.flex_attention.__globals__.values(), note


# ---- where the calling code runs


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward derivatives
def test_in_transform() -> None:
    note = changed("torch._C._are_functorch_transforms_active", "how torch.autograd.Function.apply asks for torch.func")
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(private.in_transform())
        return x.exp().sum()

    x = torch.randn(3, requires_grad=True)
    torch.vmap(forward)(x[None]), torch.func.grad(forward)(x), torch.func.vjp(forward, x)
    torch.func.jvp(forward, (x,), (x,)), torch.func.hessian(forward)(x)
    assert len(seen) == 5 and all(seen), note
    seen.clear()
    forward(x).backward()
    torch.autograd.functional.jacobian(forward, x)
    torch.func.functional_call(nn.Linear(3, 3), {}, (x,))
    assert not any(seen) and not private.in_transform(), note


def test_in_backward() -> None:
    note = changed("torch._C._current_graph_task_id", "how torch.utils.checkpoint tells one backward from another")
    seen: list[bool] = []
    x = torch.randn(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(private.in_backward()))
    assert not private.in_backward(), note
    y.sum().backward()
    torch.autograd.grad((x * 2).sum(), x)
    assert not private.in_backward(), note
    assert seen == [True], note
    seen.clear()
    checkpoint(lambda t: (seen.append(private.in_backward()), t.exp())[1], x, use_reentrant=False).sum().backward()
    assert seen == [False, True], note


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_in_reentrant_checkpoint() -> None:
    note = changed("torch.utils.checkpoint.CheckpointFunction", "what runs the forward of use_reentrant=True")
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(private.in_reentrant_checkpoint())
        return x.exp()

    x = torch.randn(3, requires_grad=True)
    forward(x)
    checkpoint(forward, x, use_reentrant=False)
    with torch.no_grad():
        forward(x)
    assert seen == [False] * 3, note
    checkpoint(forward, x, use_reentrant=True)
    assert seen[3:] == [True], note
    checkpoint(lambda t: checkpoint(forward, t, use_reentrant=False), x, use_reentrant=True)
    assert seen[4:] == [True], note
    forward(x)
    assert seen[5:] == [False], note


# ---- modes


@pytest.mark.parametrize("place", [0, 1, 2])
def test_keep_modes_takes_one_off_wherever_it_stands(place: int) -> None:
    note = changed("the stack of function modes", "TorchFunctionMode.__enter__ and __exit__")
    modes = [Seen() for _ in range(3)]
    for mode in modes:
        mode.__enter__()
    assert private.function_modes() == modes, note
    private.keep_modes(modes, [i != place for i in range(3)])
    torch.ones(1).exp()
    assert ["exp" in mode.names for mode in modes] == [i != place for i in range(3)], note
    left = [mode for mode in modes if mode is not modes[place]]
    for mode in reversed(left):  # in the order they were
        assert _pop_mode() is mode, note
    assert _len_torch_function_stack() == 0, note


def test_a_thread_has_its_own_stack_of_modes() -> None:
    found: list[Any] = []
    with Seen():
        thread = threading.Thread(target=lambda: found.append(private.function_modes()))
        thread.start()
        thread.join()
    assert found == [[]], changed("the stack of function modes", "whether it is still one for each thread")


@pytest.mark.parametrize("lost", [False, True])
def test_entered_leaves_other_modes_alone_also_where_torch_lost_the_mode(lost: bool) -> None:
    below, mode, above = Seen(), Seen(), Seen()
    with below:
        with private.entered(mode), private.entered(mode):
            assert private.function_modes() == [below, mode, mode]
            if lost:  # as where an interruption comes between pop and push
                _pop_mode()
        assert private.function_modes() == [below]
        with private.entered(mode):
            above.__enter__()
        assert private.function_modes() == [below, above]
        _pop_mode()


# ---- hooks of modules


def test_remove_hooks_removes_whichever_are_ones_own_without_their_handles() -> None:
    note = changed("the dicts of a module's hooks", "Module.register_forward_hook")
    module, heard = nn.Identity(), []

    def hook(name: str) -> Any:
        return lambda *_, **__: heard.append(name)

    own = [hook("own"), hook("own")]
    for pre, after in (own, [hook("other"), hook("other")]):
        module.register_forward_pre_hook(pre, with_kwargs=True)
        module.register_forward_hook(after, prepend=True, always_call=True, with_kwargs=True)
    before = {name: len(held) for name, held in vars(module).items() if "_hooks" in name}
    private.remove_hooks(module, lambda hook: hook in own)
    after = {name: len(held) for name, held in vars(module).items() if "_hooks" in name}
    assert after == {name: count // 2 for name, count in before.items()}, note
    module(torch.ones(1))
    assert heard == ["other", "other"], note


def test_math_kernel_has_a_second_derivative_and_the_default_kernel_a_name() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    node = type(expected.grad_fn).__name__
    assert "ScaledDotProduct" in node, changed(f"the fused kernel's node to {node}", "_has_second_derivative in cam.py")
    with private.math_kernel():
        found = F.scaled_dot_product_attention(q, k, v)
    note = changed("torch.nn.attention.sdpa_kernel", "SDPBackend.MATH")
    torch.testing.assert_close(found, expected, msg=note)
    assert "ScaledDotProduct" not in type(found.grad_fn).__name__, note
    (first,) = torch.autograd.grad(found.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), q)[0].abs().max() > 0, note
    assert "ScaledDotProduct" in type(F.scaled_dot_product_attention(q, k, v).grad_fn).__name__, note


# ---- what was made of a module


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Announcing(nn.Module):
    """Says whether it is being compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if private.is_compiling() else x - 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_is_compiling_is_true_while_a_graph_is_traced() -> None:
    note = changed("torch.compiler.is_compiling or torch._utils.is_compiling", "what torch.compile sets it to")
    x, module = torch.zeros(2), Announcing()
    assert not private.is_compiling(), note
    assert module(x).tolist() == [-1, -1], note
    assert torch.compile(module, backend="eager")(x).tolist() == [1, 1], note
    assert not private.is_compiling(), note


class Handing(TorchFunctionMode):
    """Hands functions on, and notes whether that is compiled."""

    compiled = False

    @private.never_compiled
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._hand_on(func, args, kwargs or {})

    @private.never_traced
    def _hand_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.compiled = self.compiled or private.is_compiling()
        return func(*args, **kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_never_compiled_keeps_a_modes_handler_as_it_is() -> None:
    note = changed("set_code_exec_strategy", "how torch._dynamo.decorators.skip leaves a function alone")

    def described(a: Tensor, b: Tensor) -> tuple[Any, ...]:
        return a.device == b.device, a.dim(), a + b

    mode, x = Handing(), torch.ones(2, 3)
    with mode:
        same, dim, result = torch.compile(described, backend="eager")(x, x)
    assert (same, dim, result.sum().item()) == (True, 2, 12), note
    assert not mode.compiled, note


@pytest.mark.usefixtures("fresh_dynamo")
def test_break_graph_lets_an_exception_out_of_the_traced_code() -> None:
    note = changed("torch._dynamo.graph_break", "whether what follows it still runs as Python wrote it")
    reason = ["why"] * len(inspect.signature(private.break_graph).parameters)

    def refuse(*_: Any) -> None:
        if private.is_compiling():
            private.break_graph(*reason)
            raise KeyError("found out")

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[1][0].register_forward_pre_hook(refuse)
    called = torch.compile(model, backend="eager")
    for _ in range(2):
        with pytest.raises(KeyError) as error:
            called(torch.zeros(2, 2))
        assert "found out" in str(error.value), note
    assert model(torch.zeros(2, 2)).shape == (2, 2)


@pytest.mark.usefixtures("fresh_dynamo")
def test_is_compiled_tells_both_ways_to_compile_a_module() -> None:
    note = changed("nn.Module._compiled_call_impl or torch._dynamo.OptimizedModule", "nn.Module.compile")
    module = nn.Linear(2, 2)
    assert not private.is_compiled(module), note
    assert private.is_compiled(torch.compile(module, backend="eager")), note
    assert not private.is_compiled(module), note
    module.compile(backend="eager")
    assert private.is_compiled(module), note
    assert not private.is_compiled(nn.Sequential(module)), note


@pytest.mark.usefixtures("fresh_dynamo")
def test_is_compiled_takes_no_module_for_compiled_that_is_kept_from_it() -> None:
    """Such a forward bears the marks of a compiled one, and runs as Python wrote it."""
    note = changed("what torch.compiler.disable leaves", "_torchdynamo_orig_callable and _torchdynamo_disable")
    module = nn.Linear(2, 2)
    module.forward = torch.compiler.disable(module.forward)
    assert not private.is_compiled(module), note

    class Apart(nn.Module):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert not private.is_compiled(Apart()), note


def test_replaced_buffers_are_those_in_use_until_the_attributes_are_set_back() -> None:
    note = changed("nn.Module._buffers", "nn.Module.register_buffer and __setattr__")
    module = nn.BatchNorm1d(3)
    module.register_buffer("none", None)
    mean, before = module.running_mean, dict(vars(module))
    private.replace_buffers(module, torch.clone)
    assert module.none is None, note
    assert module.running_mean is not mean, note
    module(torch.ones(2, 3))
    module.none = torch.ones(1)
    assert module.running_mean.any(), note
    assert not mean.any(), note
    vars(module).update(before)
    assert module.running_mean is mean, note
    assert module.none is None, note
    assert int(module.num_batches_tracked) == 0, note


def test_is_replica_tells_what_data_parallel_made() -> None:
    note = changed("nn.Module._replicate_for_data_parallel", "nn.parallel.replicate")
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: None)
    replica = module._replicate_for_data_parallel()
    assert not private.is_replica(module), note
    assert not private.is_replica(copy.deepcopy(module)), note
    assert private.is_replica(replica), note
    assert len(replica._forward_pre_hooks) == 1, changed("the replica's hooks", "whether replicas still carry hooks")


exports = pytest.mark.skipif(
    "strict" not in inspect.signature(torch.export.export).parameters,
    reason="what torch.export.export of torch 2.1 returns is no module",
)


@exports
@pytest.mark.parametrize("strict", [False, True])
def test_is_exported_tells_graphs_of_operators_from_graphs_of_functions(strict: bool) -> None:
    note = changed("what torch.export leaves", "whether its graph calls torch._ops.OpOverload")
    module = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1))
    exported = torch.export.export(module, (torch.zeros(1, 2),), strict=strict)
    assert private.is_exported(exported.module()), note
    assert not private.is_exported(module), note
    assert not private.is_exported(torch.fx.symbolic_trace(module)), note


def test_a_symbolic_trace_is_no_export() -> None:
    assert not private.is_exported(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1))))


def test_batch_norm_is_the_class_of_all_of_them() -> None:
    note = changed("nn.modules.batchnorm._BatchNorm", "the bases of nn.BatchNorm2d")
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
    assert all(issubclass(kind, private.BatchNorm) for kind in kinds), note
    assert not any(issubclass(kind, private.BatchNorm) for kind in (nn.LayerNorm, nn.GroupNorm)), note


# ---- a graph that is freed


class Keeps(torch.autograd.Function):
    """Saves a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class KeepsNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def _math(q: Tensor) -> Tensor:
    with private.math_kernel():
        return F.scaled_dot_product_attention(q, q, q)


NODES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda q: q.softmax(-1),
    "sdpa": lambda q: F.scaled_dot_product_attention(q, q, q),
    "sdpa with a mask": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(5, 5)),
    "math kernel": _math,
    "matmul": lambda q: q @ q.transpose(-2, -1),
    "linear": lambda q: F.linear(q, torch.ones(4, 4, requires_grad=True), torch.zeros(4)),
    "einsum": lambda q: torch.einsum("bhnd,bhmd->bhnm", q, q),
    "unbind": lambda q: torch.stack([q.exp(), q]).unbind(0)[0],
    "select": lambda q: torch.stack([q.exp(), q])[0],
    "chunk": lambda q: torch.cat([q.exp(), q], -1).chunk(2, -1)[1],
    "transpose": lambda q: q.exp().transpose(1, 2),
    "permute and view": lambda q: q.exp().permute(0, 2, 1, 3).reshape(2, 5, -1),
    "Function that saves": Keeps.apply,
    "Function that saves nothing": lambda q: KeepsNothing.apply(q.exp()),
    "clone": lambda q: q.exp().clone(),
    "add": lambda q: q.exp() + q,
    "dropout": lambda q: F.dropout(q.softmax(-1), 0.5),
    "checkpoint": lambda q: checkpoint(lambda t: (t @ t.transpose(-2, -1)).softmax(-1), q, use_reentrant=False),
    "checkpointed sdpa": lambda q: checkpoint(F.scaled_dot_product_attention, q, q, q, use_reentrant=False),
}


@pytest.mark.parametrize("hooked", [False, True], ids=["kept", "save_on_cpu"])
@pytest.mark.parametrize("name", NODES)
def test_is_freed_tells_whether_backward_freed_the_graph(name: str, hooked: bool) -> None:
    q = torch.randn(2, 2, 5, 4, requires_grad=True)
    if hooked:
        with torch.autograd.graph.save_on_cpu():
            y = NODES[name](q)
    else:
        y = NODES[name](q)
    node = y.grad_fn
    note = changed(
        f"how {type(node).__name__} says that it is freed",
        f"the _saved_* and _raw_saved_* attributes of {[n for n in dir(node) if 'saved' in n]} and their error",
    )
    assert not private.is_freed(y), note
    (first,) = torch.autograd.grad(y.sum(), q, retain_graph=True)
    assert not private.is_freed(y), note
    (second,) = torch.autograd.grad(y.sum(), q, retain_graph=True)
    assert torch.equal(first, second), f"looking at the graph of {name} changed it"
    y.sum().backward()
    assert private.is_freed(y), note
    assert torch.equal(q.grad, first), f"looking at the graph of {name} changed it"


def test_is_freed_recomputes_nothing() -> None:
    calls: list[None] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(None)
        return (x @ x.transpose(-2, -1)).softmax(-1)

    y = checkpoint(counted, torch.randn(2, 5, 4, requires_grad=True), use_reentrant=False)
    assert not private.is_freed(y)
    note = changed("torch.autograd.graph.disable_saved_tensors_hooks", "the unpack hook of non-reentrant checkpointing")
    assert len(calls) == 1, note
    y.sum().backward()
    assert private.is_freed(y), note
    assert len(calls) == 2, note


@pytest.mark.parametrize("name", ["softmax", "sdpa", "checkpoint"])
def test_is_freed_where_hooks_on_saved_tensors_are_active(name: str) -> None:
    """A training step within save_on_cpu computes its loss there too."""
    with torch.autograd.graph.save_on_cpu():
        y = NODES[name](torch.randn(2, 2, 5, 4, requires_grad=True))
        assert not private.is_freed(y)
        saved = torch.ones(2, requires_grad=True).exp()
    saved.sum().backward()
    assert not private.is_freed(torch.zeros(2)), "a tensor without a graph"
    assert not private.is_freed((torch.zeros(2, requires_grad=True) + 1).clone()), "a graph that saved nothing"


# ---- torch.distributed


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two ranks in this process: what goes from one to the other is made up."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    meshes = pytest.importorskip("torch.distributed.device_mesh", reason="torch < 2.2 has no public device mesh")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield meshes.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_dtensors_are_known_and_so_is_what_a_rank_holds_of_one(mesh: Any) -> None:
    api = importlib.import_module(f"torch.distributed.{'tensor' if torch.__version__ >= (2, 5) else '_tensor'}")
    note = changed("DTensor", "its class, placements, and the dtensor_spec that _ToTorchTensor puts on its node")
    x = torch.randn(4, 3, requires_grad=True)
    assert private.has_dtensors(), note
    assert not private.is_dtensor(x), note
    rows, whole = (api.distribute_tensor(x, mesh, [kind]) for kind in (api.Shard(0), api.Replicate()))
    for tensor, is_part in ((rows, True), (whole, False)):
        assert private.is_dtensor(tensor), note
        assert private.is_split(tensor) == is_part, note
        local = (tensor * 2).to_local() + 1
        assert not private.is_dtensor(local), note
        assert private.comes_from_split(local, set()) == is_part, note
        again = api.DTensor.from_local(local, mesh, tensor.placements).redistribute(mesh, [api.Replicate()])
        assert not private.comes_from_split(again.to_local() + 1, set()), note
    assert not private.comes_from_split(x * 2, set()), note


def test_the_store_of_the_process_group_is_where_its_processes_met() -> None:
    note = changed("_get_default_store", "how init_process_group keeps its store")
    assert private.store_of_process_group() is None, note
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        store = private.store_of_process_group()
        store.set("acr_reg/key", "value")
        assert store.get("acr_reg/key") == b"value", note
        assert store.add("acr_reg/other", 0) == 0, note
    finally:
        torch.distributed.destroy_process_group()
    assert private.store_of_process_group() is None, note


def test_without_a_process_group_there_are_no_dtensors() -> None:
    assert not private.has_dtensors()


def test_models_whose_parameters_are_sharded_are_known(mesh: Any) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    note = changed("FullyShardedDataParallel and fully_shard", "the names of their classes in torch.distributed.fsdp")
    model = nn.Sequential(nn.Linear(4, 4))
    assert not private.shards_parameters(model), note
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard in torch.distributed.fsdp")
    fsdp.fully_shard(model[0], mesh=mesh)
    assert private.shards_parameters(model), note
    wrapped = nn.Sequential(fsdp.FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    assert private.shards_parameters(wrapped), note
    note = changed("FullyShardedDataParallel and fully_shard", "_is_fsdp_managed_module, on each module within")
    for wrap in (
        lambda module: fsdp.fully_shard(module, mesh=mesh),
        lambda module: fsdp.FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    ):
        inner = nn.Linear(4, 4)
        wrapped = wrap(nn.Sequential(inner))
        assert private.shards_parameters(inner), note
        made = nn.Linear(4, 4)(wrapped(torch.ones(2, 4, requires_grad=True)))
        assert private.comes_from_shards(made), changed("FullyShardedDataParallel and fully_shard", "their graph")
    assert not private.comes_from_shards(nn.Linear(4, 4)(torch.ones(2, 4)))


def test_each_backward_has_a_number_of_its_own() -> None:
    x, numbers = torch.ones(1, requires_grad=True), list[int]()
    y = x * 2
    y.register_hook(lambda _: numbers.append(private.backward_number()))
    for _ in range(2):
        (y * 3).backward(retain_graph=True)
    assert -1 not in numbers, changed("torch._C._current_graph_task_id", "how autograd numbers its backwards")
    assert len(set(numbers)) == 2
    assert private.backward_number() == -1


# ---- nobody else


PRIVATE = re.compile(r"^_(?!_)")
HOMES = {"torch", "nn", "F"}  # what torch and its parts are called where nothing is said of an import
BEHIND = re.compile(r"^(torch\.)?nn\.modules\.\w+\.|^torch\.ops\.aten")  # not underscored, and no more public


def private_uses(source: str) -> list[str]:
    """Attributes of torch, and imports from it, that start with an underscore or lie in a module behind nn."""
    found, parts = [], set(HOMES)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname) for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for name, known_as in names:
            parts |= {known_as or "torch"}
            if any(PRIVATE.match(part) for part in name.split(".")) or BEHIND.match(name):
                found.append(name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        dotted = ast.unparse(node)
        if re.fullmatch(r"[\w.]+", dotted) and dotted.split(".")[0] in parts:
            if PRIVATE.match(node.attr) or BEHIND.match(dotted):
                found.append(dotted)
        elif node.attr in MODULE_PRIVATES and dotted != f"self.{node.attr}":  # of a class of our own
            found.append(dotted)
    return found


# Private attributes of modules, tensors and nodes, on whatever they are looked up.
MODULE_PRIVATES = {
    name
    for cls in (nn.Module, Tensor, torch.jit.ScriptModule)
    for name in (*vars(cls), *vars(nn.Linear(1, 1)))
    if PRIVATE.match(name)
} | {"_is_replica", "_compiled_call_impl", "_version", "_raw_saved_tensors"}
SOURCES = sorted(
    file
    for file in (*ROOT.rglob("*.py"), *(ROOT / "integrations").glob("*.py"))
    if "demo" not in file.relative_to(ROOT).parts and file.name != "_torch_private.py"
)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_uses_what_is_private_in_torch(file: Path) -> None:
    found = private_uses(file.read_text(encoding="utf-8"))
    assert not found, f"{file.name} uses {found}: put it into acr_reg/_torch_private.py, with a test here"


def test_the_reader_sees_every_way_to_what_is_private() -> None:
    """The test above stands on it."""
    own = private_uses((ROOT / "_torch_private.py").read_text(encoding="utf-8"))
    for expected in (
        "nn.modules.batchnorm._BatchNorm",
        "torch._C",
        "torch._C._get_function_stack_at",
        "module._forward_hooks",
        "torch._dynamo",
        "torch._ops",
    ):
        assert any(name.startswith(expected) for name in own), f"{expected} is not among {own}"
    for line in (
        "import torch._dynamo",
        "import torch._dynamo as d\nd.reset()",
        "from torch import _C",
        "from torch._C import _len",
        "from torch.overrides import _pop_mode",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from torch.nn.modules.batchnorm import BatchNorm2d",
        "from torch.utils import checkpoint as c\nc._checkpoint_hook",
        "torch.nn.functional._verify_batch_size",
        "module._forward_hooks.clear()",
        "model.block._modules['a']",
        "tensor._version",
    ):
        assert private_uses(line), f"{line!r} was let through"
    for line in (
        "from torch import nn\nnn.Module()",
        "self._modules = 1",
        "torch.nn.functional.softmax(x)",
        "from torch.overrides import TorchFunctionMode",
        "import torch\ntorch.__version__",
    ):
        assert not private_uses(line), f"{line!r} was taken for private"
