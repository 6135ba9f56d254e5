"""What cannot be captured, or not be used, ends as an error that says what was found, what was expected and what to do;
and whatever was refused, the model itself is captured right afterwards."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack, _pop_mode  # the only way to see a mode left behind
from torch.utils.checkpoint import checkpoint

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionCapture,
    AttentionMaps,
    CaptureError,
    HorizontalFlip,
    capture_attention,
    class_token_gradient_cam,
)
from tests.support.attention import says
from tests.support.models import ExplicitBlock, MultiheadBlock, PlainEncoder, explicit_vit, multihead_vit

modes = _len_torch_function_stack
Builder = Callable[[], nn.Module]
BUILDERS = {"explicit": explicit_vit, "fused": multihead_vit}
every_kind = pytest.mark.parametrize("build", [pytest.param(build, id=kind) for kind, build in BUILDERS.items()])
cold_and_warm = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])

# torch.jit says wherever it is used that it is deprecated, in a category that differs between versions.
torch_jit = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is (deprecated|not supported)", "ignore::torch.jit.TracerWarning"
)
# torch.compile looks at .grad of a tensor within a graph, of which torch itself warns; and it follows the mode's code
# where a compiled function runs under it.
dynamo = pytest.mark.filterwarnings(
    r"ignore:The \.grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
    r"ignore:Dynamo does not know how to trace the builtin `sys\._getframe:UserWarning",
)


@pytest.fixture(autouse=True)
def _seed_and_clean_up() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    left = modes()
    while modes():  # so that a mode that one test left behind fails that test alone
        _pop_mode()
    assert left == 0, "a mode was left behind"


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 48)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def is_captured_right(model: nn.Module, attention: AttentionCapture, x: Tensor, output: Tensor, maps: Any) -> None:
    """Whether a forward gives this output and these maps, twice: the second run watches attention modules alone."""
    for _ in range(2):
        assert torch.equal(model(x), output)
        found = attention.take()
        assert [layer.name for layer in found] == [layer.name for layer in maps]
        assert all(torch.equal(a, b) for a, b in zip(found.weights(), maps.weights(), strict=True))
        assert modes() == 0


def plain_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, AttentionMaps]:
    """What the model returns, and the maps of a capture of nothing but that."""
    with capture_attention(model) as attention:
        return model(x), attention.take()


# ---- nothing captured


class PooledAttention(nn.Module):
    """Named as if it were attention, which it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@cold_and_warm
def test_nothing_captured_names_the_modules_that_look_like_attention(warm: bool) -> None:
    model = PlainEncoder(nn.Sequential(*(PooledAttention() for _ in range(4))))
    with capture_attention(model) as attention:
        for _ in range(1 + warm):
            model(images())
            with pytest.raises(CaptureError) as error:
                attention.take()
            named = [f"encoder.{i} (PooledAttention)" for i in range(3)]
            assert says(error, "no token-to-token attention of PlainEncoder", ", ".join(named), "and more", "softmax")


def test_nothing_captured_says_that_nothing_ran() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        with pytest.raises(CaptureError) as error:
            attention.take()
        assert says(error, "since the last take", "run this model (not a copy, nor a compiled or traced one)")
        copy.deepcopy(model)(images())
        with pytest.raises(CaptureError) as error:
            attention.take()
        assert says(error, "since the last take", "run this model (not a copy")


def test_a_pass_is_taken_once() -> None:
    model = explicit_vit()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            attention.take()
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, "since the last take", "take() once per forward")


# ---- torch.compile


Compiled = tuple[nn.Module, Callable[[], None]]  # what to call, and what makes the model an ordinary one again


def _whole(model: nn.Module, backend: str) -> Compiled:
    return torch.compile(model, backend=backend), lambda: None  # type: ignore[return-value]


def _whole_in_place(model: nn.Module, backend: str) -> Compiled:
    model.compile(backend=backend)
    return model, lambda: setattr(model, "_compiled_call_impl", None)


def _block(model: nn.Module, backend: str) -> Compiled:
    plain = model.encoder[1]
    model.encoder[1] = torch.compile(plain, backend=backend)
    return model, lambda: model.encoder.__setitem__(1, plain)


def _block_in_place(model: nn.Module, backend: str) -> Compiled:
    plain = model.encoder[1]
    plain.compile(backend=backend)
    return model, lambda: setattr(plain, "_compiled_call_impl", None)


has_compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
inductor = pytest.mark.skipif(not has_compiler, reason="inductor needs a C++ compiler")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("way", "build"),
    [
        (_whole, multihead_vit),
        (_whole_in_place, explicit_vit),
        (_block, explicit_vit),
        (_block_in_place, multihead_vit),
    ],
)
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_a_model_that_was_compiled_is_refused(way: Callable[[nn.Module, str], Compiled], build: Builder) -> None:
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    compiled, undo = way(model, "eager")
    for _ in range(2):  # before and after it was run
        with pytest.raises(CaptureError) as error:
            capture_attention(compiled)
        assert says(error, "which is compiled", "capture the original model")
        assert ("encoder.1 (" in str(error.value)) == ("block" in way.__name__)
        assert hooks(compiled) == 0
        compiled(x)
    with pytest.raises(CaptureError) as error:
        capture_attention(nn.Sequential(nn.Identity(), compiled))
    assert says(error, "1.encoder.1 (" if "block" in way.__name__ else "found 1 (", "which is compiled")
    undo()
    with capture_attention(model) as attention:
        is_captured_right(model, attention, x, output, maps)


@pytest.mark.parametrize(
    ("way", "backend", "build"),
    [
        (_whole, "eager", explicit_vit),
        (_whole, "aot_eager", multihead_vit),
        pytest.param(_whole, "inductor", explicit_vit, marks=inductor),
        (_whole_in_place, "eager", multihead_vit),
        (_whole_in_place, "aot_eager", explicit_vit),
        (_block, "eager", multihead_vit),
        (_block, "aot_eager", explicit_vit),
        (_block_in_place, "eager", explicit_vit),
        (_block_in_place, "aot_eager", multihead_vit),
    ],
)
@cold_and_warm
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_a_captured_model_that_is_compiled_is_refused_when_it_runs(
    way: Callable[[nn.Module, str], Compiled], backend: str, build: Builder, warm: bool
) -> None:
    model, x = build().eval(), images()
    output, maps = plain_pass(model, x)
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        compiled, undo = way(model, backend)
        for _ in range(2):
            with pytest.raises(CaptureError) as error:
                compiled(x)
            assert says(error, "found torch.compile", "tracing a captured model", "before tracing")
            assert modes() == 0
        undo()
        is_captured_right(model, attention, x, output, maps)
    if not warm and backend != "inductor":  # which takes its time
        torch.testing.assert_close(way(model, backend)[0](x), output)


@every_kind
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_compiled_code_from_before_the_capture_does_not_run_past_it(build: Builder) -> None:
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with capture_attention(model) as attention:
        with pytest.raises(CaptureError) as error:
            compiled(x)
        assert says(error, "found torch.compile", "run the captured model uncompiled")
        is_captured_right(model, attention, x, output, maps)
    torch.testing.assert_close(compiled(x), output)


@every_kind
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_a_captured_model_compiled_as_one_graph_is_refused(build: Builder) -> None:
    """Nothing is raised past torch's own error then: it must be in this one's words."""
    if not inspect.signature(torch._dynamo.graph_break).parameters:
        pytest.skip("torch's error of a graph that may not be broken repeats no reason in this old torch")
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    with capture_attention(model) as attention:
        for _ in range(2):  # cold and warm
            with pytest.raises(Exception, match="captured model") as error:
                torch.compile(model, backend="eager", fullgraph=True)(x)
            assert says(error, "before tracing")
            is_captured_right(model, attention, x, output, maps)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), output)


@pytest.mark.parametrize(("build", "part"), [(multihead_vit, ""), (explicit_vit, "encoder.1")], ids=["model", "block"])
@pytest.mark.parametrize("when", ["before", "before and run", "after", "after a take"])
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_a_compiled_forward_is_refused_or_captured_right(build: Builder, part: str, when: str) -> None:
    """``model.forward = torch.compile(model.forward)``, which leaves no mark on the module."""
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    module, attention = model.get_submodule(part), None
    if when.startswith("after"):
        attention = capture_attention(model)
    if when == "after a take":
        model(x)
        attention.take()
    module.forward = torch.compile(module.forward, backend="eager")
    if when == "before and run":
        model(x)
    refused = None
    try:
        attention = attention or capture_attention(model)
        is_captured_right(model, attention, x, output, maps)
    except CaptureError as error:
        refused = str(error)
    if attention is not None:
        attention.remove()
    assert refused is None or "found torch.compile" in refused or "which is compiled" in refused
    torch.testing.assert_close(model(x), output)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class FunctionAttention(nn.Module):
    """Attention by a function that is given."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.qkv, self.function = nn.Linear(width, 3 * width), function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.function(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("function", "backend", "run"),
    [(_sdpa, "eager", False), (_softmax, "eager", True), (_softmax, "aot_eager", False), (_sdpa, "aot_eager", True)],
)
@pytest.mark.usefixtures("fresh_dynamo")
@dynamo
def test_a_compiled_function_within_a_block_is_refused_or_captured_right(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], backend: str, run: bool
) -> None:
    model, x = PlainEncoder(nn.Sequential(FunctionAttention(function), FunctionAttention(function))), images()
    output, maps = plain_pass(model, x)
    model.encoder[0].function = torch.compile(function, backend=backend)
    if run:
        model(x).sum().backward()
    with capture_attention(model) as attention:
        try:
            is_captured_right(model, attention, x, output, maps)
            model(x)
            taken, refused = attention.take(), None
        except CaptureError as error:
            taken, refused = None, str(error)
    if taken is None:
        assert "encoder.0" in refused, "it was captured in part, or refused for another reason"
        return
    gradients = [
        torch.autograd.grad(m[0].weights()[:, :, 0].square().sum(), model.encoder[0].qkv.weight) for m in (maps, taken)
    ]
    assert torch.equal(gradients[0][0], gradients[1][0])


# ---- torch.jit, torch.export, torch.fx


def _traced(module: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(module, x, check_trace=False)  # type: ignore[return-value]


def _scripted(module: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.script(module)  # type: ignore[return-value]


def _exported(module: nn.Module, x: Tensor, strict: bool = False) -> nn.Module:
    return torch.export.export(module, (x,), strict=strict).module()


def _exported_strictly(module: nn.Module, x: Tensor) -> nn.Module:
    return _exported(module, x, strict=True)


torch_export = pytest.mark.skipif(
    not hasattr(torch.export, "load") or "strict" not in torch.export.export.__code__.co_varnames,
    reason="torch.export.export knows strict= since torch 2.2 and leaves a module that runs since then",
)
made_by = pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(_traced, "scripted or traced by torch.jit", id="traced"),
        pytest.param(_scripted, "scripted or traced by torch.jit", id="scripted"),
        pytest.param(_exported, "exported", id="exported", marks=torch_export),
        pytest.param(_exported_strictly, "exported", id="exported strictly", marks=torch_export),
    ],
)


@made_by
@every_kind
@torch_jit
def test_a_traced_scripted_or_exported_module_is_refused(
    make: Callable[[nn.Module, Tensor], nn.Module], kind: str, build: Builder
) -> None:
    if make is _scripted and build is explicit_vit:
        build = ScriptableVit  # type: ignore[assignment]
    model, x = build().eval(), images()
    output, maps = plain_pass(model, x)
    whole, block = make(model, x), make(model.encoder[1], torch.randn(2, 25, 32))
    nested = copy.deepcopy(model)
    nested.encoder[1] = block
    for found, name in ((whole, "a model ("), (nn.Sequential(nn.Identity(), whole), "1 ("), (nested, "encoder.1 (")):
        before = hooks(found)
        with pytest.raises(CaptureError) as error:
            capture_attention(found)
        assert says(error, f"found {name}", f"which is {kind}", "capture the original model")
        assert hooks(found) == before
    with capture_attention(model) as attention:
        is_captured_right(model, attention, x, output, maps)


class ScriptableAttention(nn.Module):
    """Softmax and matmul in what torch.jit.script understands."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.query(x), self.key(x).transpose(-2, -1))
        return x + torch.matmul(torch.softmax(scores, -1), self.value(x))


class ScriptableVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.encoder = nn.Sequential(ScriptableAttention(), ScriptableAttention())

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        return self.encoder(torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1))[:, 0]


@made_by
@every_kind
@torch_jit
def test_a_captured_model_is_not_traced_scripted_or_exported(
    make: Callable[[nn.Module, Tensor], nn.Module], kind: str, build: Builder
) -> None:
    model, x = build().eval(), images()
    if make is _scripted and build is explicit_vit:
        model = ScriptableVit().eval()
    output, maps = plain_pass(model, x)
    with capture_attention(model) as attention:
        for _ in range(2):  # cold and warm
            for wrapped in (model, nn.Sequential(nn.Identity(), model)):
                with pytest.raises(Exception, match="captured model") as error:
                    make(wrapped, x)
                assert says(error, "before tracing")
                if make is not _exported_strictly:  # there torch wraps what it is told
                    assert isinstance(error.value, CaptureError)
                assert modes() == 0
            is_captured_right(model, attention, x, output, maps)
    torch.testing.assert_close(make(model, x)(x), output)


def test_a_symbolically_traced_model_is_captured_right() -> None:
    """Its kernels are torch's functions still, called by the one module that it became."""
    import timm

    model, x = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5, depth=3).eval(), images()
    output, maps = plain_pass(model, x)
    traced = torch.fx.symbolic_trace(model)
    for module in (traced, nn.Sequential(traced)):
        with capture_attention(module) as attention:
            for _ in range(2):
                assert torch.equal(module(x), output)
                found = attention.take()
                assert attention.skipped == ()
                for a, b in zip(found, maps, strict=True):
                    assert torch.equal(a.weights(), b.weights())
                    assert a.layout == b.layout
                loss = found[0].weights()[:, :, 0].square().sum()
                assert torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight)[0].abs().max() > 0


def test_a_feature_extractor_of_torchvision_is_captured_right() -> None:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    x = torch.randn(2, 3, 64, 64)
    model = torchvision.models.VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=5).eval()
    _, maps = plain_pass(model, x)
    extractor = create_feature_extractor(model, {"encoder.ln": "tokens"})
    tokens = extractor(x)["tokens"]
    with capture_attention(extractor) as attention:
        for _ in range(2):
            assert torch.equal(extractor(x)["tokens"], tokens)
            found = attention.take()
            assert attention.skipped == ()
            for a, b in zip(found, maps, strict=True):
                assert torch.equal(a.weights(), b.weights())
                assert a.layout == b.layout


# ---- modules that the capture does not know


def replica_of(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for each device, where devices are at hand."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters(recurse=False):
        replica._parameters.pop(name, None)
        setattr(replica, name, parameter.clone())
    for name, child in module.named_children():
        replica._modules[name] = replica_of(child)
    return replica


class Parallel(nn.Module):
    """nn.DataParallel with one worker, on the device at hand."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        replica, results = replica_of(self.module), []

        def work() -> None:
            try:
                results.append(replica(x))
            except BaseException as error:
                results.append((error, modes()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(results[0], tuple):
            error, left = results[0]
            assert left == 0, "a mode was left behind on the worker"
            raise error
        return results[0]


@every_kind
@cold_and_warm
@pytest.mark.parametrize("captured", ["inside", "outside"])
def test_replicas_of_data_parallel_are_refused(build: Builder, warm: bool, captured: str) -> None:
    model, x = build(), images()
    output, maps = plain_pass(model, x)
    parallel = Parallel(model)
    assert torch.equal(parallel(x), output)
    with capture_attention(model if captured == "inside" else parallel) as attention:
        if warm:
            model(x)
            attention.take()
        with pytest.raises(CaptureError) as error:
            parallel(x)
        assert says(error, "nn.DataParallel runs replicas", "use DistributedDataParallel")
        assert modes() == 0
        for _ in range(2):
            assert torch.equal(model(x), output)
            assert all(torch.equal(a, b) for a, b in zip(attention.take().weights(), maps.weights(), strict=True))
    for found, name in ((replica_of(model), "a model ("), (nn.Sequential(replica_of(model)), "0 (")):
        with pytest.raises(CaptureError) as error:
            capture_attention(found)
        assert says(error, f"found {name}", "which is a replica of nn.DataParallel")


@pytest.mark.parametrize("block", [ExplicitBlock, lambda: MultiheadBlock(False)], ids=["explicit", "fused"])
@pytest.mark.parametrize("change", ["added", "exchanged"])
@cold_and_warm
def test_an_attention_module_that_joins_a_captured_model_is_refused(
    block: Callable[[], nn.Module], change: str, warm: bool
) -> None:
    """Unwatched, its layer would be missing, or stand under the name of whatever it lies in."""
    model, x = PlainEncoder(nn.Sequential(block(), block(), block())), images()
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        if change == "added":
            model.encoder.append(block())
        else:
            model.encoder[1] = block()
        with pytest.raises(CaptureError) as error:  # noqa: PT012  # either may be the one to notice
            model(x)
            attention.take()
        assert says(error, "encoder.3" if change == "added" else "encoder.1", "capture again after the change")
        assert modes() == 0
    with capture_attention(model) as attention:
        model(x)
        assert len(attention.take()) == (4 if change == "added" else 3)


@cold_and_warm
def test_another_module_that_joins_or_leaves_a_captured_model_does_not_matter(warm: bool) -> None:
    model, x = explicit_vit(3), images()
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        model.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 7))
        for _ in range(2):
            model(x)
            assert [layer.name for layer in attention.take()] == [f"encoder.{i}" for i in range(3)]
        del model.encoder[1]
        for _ in range(2):
            model(x)
            assert len(attention.take()) == 2


# ---- kernels that leave nothing to record


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")  # torch 2.1: last
    kernel = next(getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))
    return kernel(q, k, v)[0]


class Opaque(torch.autograd.Function):
    """Attention whose forward and backward are written by hand, as in flash_attn and xformers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        by_weights = gradient @ v.transpose(-2, -1)
        scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return scores @ k, scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ gradient


@pytest.mark.parametrize("kernel", [_cpu_flash, Opaque.apply], ids=["operator", "autograd.Function"])
@pytest.mark.parametrize("others", [_sdpa, _softmax], ids=["fused", "explicit"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_block_whose_kernel_leaves_nothing_to_record_is_named(kernel: Any, others: Any, where: int) -> None:
    functions = [others] * 3
    functions[where] = kernel
    model, x = PlainEncoder(nn.Sequential(*map(FunctionAttention, functions))), images()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, "found attention in 2 modules", f"encoder.{where}", "switch other kernels", "modules=")
            if kernel is _cpu_flash:
                assert "_scaled_dot_product_flash_attention" in str(error.value)
            assert modes() == 0
        model.encoder[where].function = others
        model(x)
        assert len(attention.take()) == 3
    seen = [f"encoder.{i}" for i in range(3) if i != where]
    model.encoder[where].function = kernel
    with capture_attention(model, modules=seen) as attention:  # the advice of the message
        for _ in range(2):
            model(x)
            assert [layer.name for layer in attention.take()] == seen


class Mixer(FunctionAttention):
    """Of another class than the other blocks, by a name that says nothing."""


@pytest.mark.parametrize("others", [ExplicitBlock, lambda: MultiheadBlock(False)], ids=["explicit", "fused"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_kernel_that_leaves_nothing_to_record_is_named_in_a_block_unlike_the_others(others: Any, where: int) -> None:
    blocks = [others() for _ in range(3)]
    blocks[where] = Mixer(_cpu_flash)
    model, x = PlainEncoder(nn.Sequential(*blocks)), images()
    with capture_attention(model) as attention:
        for _ in range(3):  # from the second pass on only attention modules are watched: this must be one of them
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, f"encoder.{where} (_scaled_dot_product_flash_attention", "switch other kernels")


@pytest.mark.parametrize("kernel", [_cpu_flash, Opaque.apply], ids=["operator", "autograd.Function"])
def test_a_model_of_such_kernels_alone_is_refused_by_name(kernel: Any) -> None:
    model, x = PlainEncoder(nn.Sequential(FunctionAttention(kernel), FunctionAttention(kernel))), images()
    with capture_attention(model) as attention:
        for _ in range(2):
            model(x)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, "encoder.0 (FunctionAttention)", "encoder.1 (FunctionAttention)")


# ---- maps without a graph, or with one that is gone


def views_of(model: nn.Module, attention: AttentionCapture, x: Tensor) -> tuple[Tensor, AttentionMaps, AttentionMaps]:
    logits_a, maps_a = model(x), attention.take()
    logits_b, maps_b = model(x.flip(-1)), attention.take()
    return logits_a.sum() + logits_b.sum(), maps_a, maps_b


@every_kind
def test_maps_without_a_graph_are_refused_where_the_loss_needs_one(build: Builder) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, no_grad=True) as attention:
        with torch.no_grad():
            _, maps_a, maps_b = views_of(model, attention, x)
            value = acr(maps_a, maps_b)
        with pytest.raises(ValueError, match="found no gradient in the maps of either view") as error:
            acr(maps_a, maps_b)
        assert says(error, "layers (0, 1)", "outside torch.no_grad")
        _, learning, other = views_of(model, attention, x)
        torch.testing.assert_close(acr(learning, maps_b).detach(), value)  # a teacher's side needs none
        with pytest.raises(ValueError, match="found no gradient") as error:
            acr(learning.detach(), other.detach())
        assert says(error)
    model.requires_grad_(False)
    with capture_attention(model) as attention:
        _, maps_a, maps_b = views_of(model, attention, x)
        with pytest.raises(ValueError, match="found no gradient") as error:
            acr(maps_a, maps_b)
        assert says(error, "unfrozen query and key weights")


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # type: ignore[return-value]


def checkpointed(block: Callable[[], nn.Module]) -> Builder:
    return lambda: PlainEncoder(nn.Sequential(*(Checkpointed(block()) for _ in range(2))))


GRAPHS = {
    "explicit": (explicit_vit, False),
    "fused": (multihead_vit, False),
    "weights asked for": (lambda: multihead_vit(need_weights=True), False),
    "math kernel": (multihead_vit, True),
    "checkpointed explicit": (checkpointed(ExplicitBlock), False),
    "checkpointed fused": (checkpointed(lambda: MultiheadBlock(False)), False),
    "checkpointed math kernel": (checkpointed(lambda: MultiheadBlock(False)), True),
}
every_graph = pytest.mark.parametrize(("build", "double_backward"), GRAPHS.values(), ids=GRAPHS)


@every_graph
@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "save_on_cpu"])
@pytest.mark.parametrize("freed_by", ["the loss", "the logits"])
def test_maps_whose_graph_backward_has_freed_are_refused(
    build: Builder, double_backward: bool, offloaded: bool, freed_by: str
) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, double_backward=double_backward) as attention:
        with torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            logits, maps_a, maps_b = views_of(model, attention, x)
        loss = acr(maps_a, maps_b)
        expected = loss.item()
        (loss + logits if freed_by == "the loss" else logits).backward()
        for pair, side in (((maps_a, maps_b), "a"), ((maps_a.detach(), maps_b), "b"), ((maps_a, maps_b.detach()), "a")):
            with pytest.raises(ValueError, match="already freed") as error:
                acr(*pair)
            assert says(error, f"view {side}", "take() them anew in each step")
        with torch.no_grad():
            torch.testing.assert_close(acr(maps_a, maps_b).item(), expected)  # the values can still be looked at
        _, fresh_a, fresh_b = views_of(model, attention, x)
        with pytest.raises(ValueError, match="already freed") as error:
            acr(fresh_a, maps_b)  # the maps of the step before
        assert says(error, "view b")
        acr(fresh_a, fresh_b).backward()


@every_graph
@pytest.mark.parametrize("offloaded", [False, True], ids=["kept", "save_on_cpu"])
def test_a_graph_that_is_kept_serves_as_often_as_one_likes(
    build: Builder, double_backward: bool, offloaded: bool
) -> None:
    model, acr, x = build(), AllPairsConsistencyLoss(HorizontalFlip()), images()
    with capture_attention(model, double_backward=double_backward) as attention:
        with torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            logits, maps_a, maps_b = views_of(model, attention, x)
        gradients = []
        for _ in range(2):
            model.zero_grad()
            logits.backward(retain_graph=True)
            acr(maps_a, maps_b).backward(retain_graph=True)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) > 4
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_graph
def test_a_step_within_save_on_cpu_gives_the_gradient_of_one_without(build: Builder, double_backward: bool) -> None:
    """Looking whether the graph is alive must neither need the hooks off nor set them off."""
    model, acr, x, gradients = build(), AllPairsConsistencyLoss(HorizontalFlip()), images(), []
    with capture_attention(model, double_backward=double_backward) as attention:
        for saving in (nullcontext(), torch.autograd.graph.save_on_cpu()):
            model.zero_grad()
            with saving:
                logits, maps_a, maps_b = views_of(model, attention, x)
                (logits + acr(maps_a, maps_b)).backward()
                gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                with pytest.raises((ValueError, RuntimeError), match=r"already freed|second time"):
                    acr(maps_a, maps_b).backward()
    for plain, offloaded in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, offloaded)


@every_kind
def test_a_cam_on_a_graph_that_backward_has_freed_is_refused(build: Builder) -> None:
    model = build().eval()
    with capture_attention(model) as attention:
        logits = model(images())
        maps = attention.take()
        logits.sum().backward()
        with pytest.raises(RuntimeError, match="already freed") as error:
            class_token_gradient_cam(logits, maps)
        assert says(error, "before loss.backward()", "retain_graph=True")
        other = model(images())
        with pytest.raises(ValueError, match="do not depend on these maps") as error:
            class_token_gradient_cam(other, maps)
        assert says(error, "same forward")


@pytest.mark.parametrize("build", [lambda **k: multihead_vit(**k), explicit_vit], ids=["fused", "explicit"])
def test_attention_dropout_is_refused_where_it_breaks_the_identity_of_the_cam(build: Any) -> None:
    model, x = build(dropout=0.3).train(), images()
    with capture_attention(model) as attention:
        for training in (True, False):
            model.train(training)
            logits, maps = model(x), attention.take()
            assert [layer.dropout for layer in maps] == [0.3 * training] * 2
            if training and maps[0].is_factored:
                with pytest.raises(ValueError, match=r"attention dropout 0\.3 is active in a fused kernel") as error:
                    class_token_gradient_cam(logits, maps)
                assert says(error, "layer 0 (encoder.0.attention)", "Run the forward in eval mode")
            else:
                assert class_token_gradient_cam(logits, maps).amax((2, 3)).min() > 0


# ---- passes and layers that do not correspond


class Crops(nn.Module):
    """Runs its encoder on the images, then on each of the crops: DINO and MCT-like training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = multihead_vit()

    def forward(self, x: Tensor, *crops: Tensor) -> Tensor:
        return torch.stack([self.encoder(each).sum() for each in (x, *crops)]).sum()


def test_passes_that_do_not_correspond_are_refused() -> None:
    model, acr, x = Crops(), AllPairsConsistencyLoss(HorizontalFlip()), images()

    def both(keep: Any, crops_a: int, crops_b: int) -> tuple[AttentionMaps, AttentionMaps]:
        maps = []
        with capture_attention(model, keep=keep) as attention:
            for side, crops in ((x, crops_a), (x.flip(-1), crops_b)):
                model(side, *(images() for _ in range(crops)))
                maps.append(attention.take())
        return maps[0], maps[1]

    expected = acr(*both("only", 0, 0)).item()
    for crops_a, crops_b in ((3, 0), (0, 3)):
        with pytest.raises(ValueError, match="found maps of encoder run") as error:
            acr(*both("last", crops_a, crops_b))
        assert says(error, f"run {crops_a} since", f"of run {crops_b} in", 'keep="first"')
        assert acr(*both("first", crops_a, crops_b)).item() == expected
    assert acr(*both("last", 0, 0)).item() == expected
    assert acr(*both("last", 3, 3)) > 0
    with pytest.raises(CaptureError) as error:
        both("only", 3, 0)
    assert says(error, "found 4 encoder runs", 'keep="first"')


class LayerDrop(nn.Sequential):
    """Leaves out some of its blocks, as the test says and not at random."""

    dropped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self):
            x = x if index in self.dropped else block(x)
        return x


@pytest.mark.parametrize("block", [ExplicitBlock, lambda: MultiheadBlock(False)], ids=["explicit", "fused"])
@cold_and_warm
def test_layers_that_do_not_correspond_are_refused(block: Callable[[], nn.Module], warm: bool) -> None:
    acr, x = AllPairsConsistencyLoss(HorizontalFlip()), images()
    model = PlainEncoder(LayerDrop(*(block() for _ in range(4))))
    with capture_attention(model) as attention:

        def take(side: Tensor, *dropped: int) -> AttentionMaps:
            model.encoder.dropped = dropped
            model(side)
            return attention.take()

        if warm:
            take(x)
        maps = take(x, 1)
        with pytest.raises(ValueError, match="expected the same block") as error:
            acr(maps, take(x.flip(-1), 2))
        assert says(error, "found maps of encoder.2", "of encoder.1", "(LayerDrop), switch that off")
        with pytest.raises(ValueError, match="expected the same") as error:
            acr(maps, take(x.flip(-1)))
        assert says(error, "layers (0, 1, 2)", "(0, 1, 2, 3)")
        assert acr(maps, take(x.flip(-1), 1)) > 0


# ---- a frozen backbone


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: explicit_vit(4), id="explicit"),
        pytest.param(lambda: multihead_vit(4), id="fused"),
        pytest.param(lambda: multihead_vit(4, need_weights=True), id="weights asked for"),
    ],
)
@pytest.mark.parametrize("graph_from", [0, 1, 2, -2])
def test_graph_from_gives_the_cam_of_a_wholly_frozen_model(build: Builder, graph_from: int) -> None:
    # In training mode, because nn.MultiheadAttention without any gradient otherwise takes torch's inference path.
    model, x = build().train(), images()
    with capture_attention(model) as attention:
        expected = class_token_gradient_cam(model(x), attention.take(), start_layer=graph_from)
    assert expected.amax() > 0
    model.requires_grad_(False)
    output = model(x)
    with capture_attention(model) as attention:
        logits = model(x)
        with pytest.raises(ValueError, match="no graph to layer") as error:
            class_token_gradient_cam(logits, attention.take(), start_layer=graph_from)
        assert says(error, f"layer {graph_from % 4} (", "capture_attention(model, graph_from=)")
    with capture_attention(model, graph_from=graph_from) as attention:
        if graph_from < 0:  # counts from the last layer of a run that was taken
            assert torch.equal(model(x), output)
            attention.take()
        for _ in range(2):
            logits, maps = model(x), attention.take()
            assert torch.equal(logits, output)
            found = class_token_gradient_cam(logits, maps, start_layer=graph_from)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            first = graph_from % 4
            for layer in maps:
                recorded = layer.recorded
                below = [recorded.query, recorded.key, recorded.value]  # those of the first layer lie below the graph
                tensors = [t for t in (*below, recorded.output, recorded.map) if t is not None]
                if layer.index < first:
                    assert not any(t.requires_grad for t in tensors), f"layer {layer.index} has a graph"
                if layer.index == first:
                    assert not any(t.requires_grad for t in below if t is not None)
                    assert [t.is_leaf for t in tensors if t.requires_grad] == [True]
                if layer.index > first:
                    assert all(t.grad_fn is not None for t in tensors)
            if first:
                with pytest.raises(ValueError, match="no graph to layer") as error:
                    class_token_gradient_cam(logits, maps, start_layer=0)
                assert says(error, f"layer {first - 1} (", "graph_from=")
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        with torch.no_grad():
            assert not model(x).requires_grad


@every_kind
def test_graph_from_leaves_a_model_that_learns_as_it_is(build: Builder) -> None:
    model, x = build().eval(), images()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    with capture_attention(model, graph_from=0) as attention:
        logits, maps = model(x), attention.take()
        tensors = [t for layer in maps for t in (layer.recorded.output, layer.recorded.map) if t is not None]
        assert not any(t.is_leaf for t in tensors)
        found = torch.autograd.grad(logits.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
