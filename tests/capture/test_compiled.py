"""Compiled, traced, scripted and exported models are refused by name or captured right, and the original still is."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from acr_reg import CaptureError, capture_attention
from tests.support.attention import says
from tests.support.capturing import cold_and_warm, hooks, images, is_captured_right, modes, plain_pass
from tests.support.models import PlainEncoder, explicit_vit, multihead_vit
from tests.support.models.plain import Builder, FunctionAttention, every_kind, explicit_attention, fused_attention

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
        assert says(error, "compiled", "original")
        assert ("encoder.1 (" in str(error.value)) == ("block" in way.__name__)
        assert hooks(compiled) == 0
        compiled(x)
    with pytest.raises(CaptureError) as error:
        capture_attention(nn.Sequential(nn.Identity(), compiled))
    assert says(error, "1.encoder.1 (" if "block" in way.__name__ else "1 (", "compiled")
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
            assert says(error, "torch.compile", "captured model", "tracing")
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
        assert says(error, "torch.compile", "uncompiled")
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
    assert refused is None or "torch.compile" in refused or "compiled" in refused
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize(
    ("function", "backend", "run"),
    [
        (fused_attention, "eager", False),
        (explicit_attention, "eager", True),
        (explicit_attention, "aot_eager", False),
        (fused_attention, "aot_eager", True),
    ],
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
    for found, name in ((whole, "The model ("), (nn.Sequential(nn.Identity(), whole), "1 ("), (nested, "encoder.1 (")):
        before = hooks(found)
        with pytest.raises(CaptureError) as error:
            capture_attention(found)
        assert says(error, name, kind, "original")
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


@torch_jit
@cold_and_warm
def test_a_deep_copy_of_a_captured_model_is_scripted(warm: bool) -> None:
    model, x = ScriptableVit().eval(), images()
    output = model(x)
    with capture_attention(model) as attention:
        if warm:
            model(x), attention.take()
        copied = copy.deepcopy(model)
        assert torch.equal(_scripted(copied, x)(x), output)
        with pytest.raises(CaptureError, match="captured model"):
            _scripted(model, x)


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
