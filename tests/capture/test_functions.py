"""Kernels of xformers and flash_attn, by stand-ins of the same signatures: recorded as factors, or refused by name."""

from __future__ import annotations

import cProfile
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acr_reg import CaptureError, GradientCam, HorizontalFlip, capture_attention, check
from tests.support import kernels
from tests.support.attention import says
from tests.support.capturing import affinity_loss, captured, cold_and_warm, images, modes
from tests.support.models.tokens import GRID, Attention, Tokens


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels.install(monkeypatch)
    yield
    assert sys.getprofile() is None, "a profile function was left behind"


class Calling(Attention):
    """Gives q, k and v (B, N, H, d) to a function, as the packages want them."""

    def __init__(self, call: Callable[..., Any], heads: int = 4) -> None:
        super().__init__(heads=heads)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        return x + self.proj(self.call(q, k, v).flatten(2))


class OriginalDinov2(nn.Module):
    """MemEffAttention of facebookresearch/dinov2, which binds the names when it is imported."""

    def __init__(self, dim: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        from xformers.ops import memory_efficient_attention, unbind

        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attend, self.unbind = memory_efficient_attention, unbind

    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.unbind(self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads), 2)
        return self.proj(self.attend(q, k, v, attn_bias=attn_bias).reshape([b, n, c]))


def by_attribute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops as xops

    return xops.memory_efficient_attention(q, k, v)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch, as xformers took them first: (B H, N, d)."""
    b, n, h, d = q.shape
    q, k, v = (t.transpose(1, 2).reshape(b * h, n, d) for t in (q, k, v))
    return kernels.memory_efficient_attention(q, k, v).reshape(b, h, n, d).transpose(1, 2)


TOKENS = GRID[0] * GRID[1]
BIAS = torch.linspace(-2, 2, TOKENS * TOKENS).reshape(TOKENS, TOKENS)
F_, X_ = kernels.flash_attn_func, kernels.memory_efficient_attention

RECORDED: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    # how it is called, and what it makes of q k^T
    "xformers": (X_, lambda s: s * 8**-0.5),
    "xformers by attribute": (by_attribute, lambda s: s * 8**-0.5),
    "xformers by keyword": (lambda q, k, v: X_(value=v, key=k, query=q, op=object()), lambda s: s * 8**-0.5),
    "xformers bound": (functools.partial(X_, scale=0.3), lambda s: s * 0.3),
    "xformers flattened": (flattened, lambda s: s * 8**-0.5),
    "xformers bias": (
        lambda q, k, v: X_(q, k, v, BIAS.expand(len(q), q.shape[2], -1, -1)),
        lambda s: s * 8**-0.5 + BIAS,
    ),
    "xformers causal": (
        lambda q, k, v: X_(q, k, v, kernels.LowerTriangularMask()),
        lambda s: s * 8**-0.5 + kernels.band(TOKENS, TOKENS, after=0),
    ),
    "flash_attn": (F_, lambda s: s * 8**-0.5),
    "flash_attn scale": (lambda q, k, v: F_(q, k, v, 0.0, 0.2, deterministic=True), lambda s: s * 0.2),
    "flash_attn causal": (
        lambda q, k, v: F_(q, k, v, causal=True),
        lambda s: s * 8**-0.5 + kernels.band(TOKENS, TOKENS, after=0),
    ),
    "flash_attn window": (
        lambda q, k, v: F_(q, k, v, window_size=(3, 5)),
        lambda s: s * 8**-0.5 + kernels.band(TOKENS, TOKENS, 3, 5),
    ),
    "flash_attn causal window": (
        lambda q, k, v: F_(q, k, v, causal=True, window_size=(3, 3)),
        lambda s: s * 8**-0.5 + kernels.band(TOKENS, TOKENS, 3, 0),
    ),
    "flash_attn window before": (
        lambda q, k, v: F_(q, k, v, window_size=(0, -1)),
        lambda s: s * 8**-0.5 + kernels.band(TOKENS, TOKENS, before=0),
    ),
    "flash_attn with more returned": (lambda q, k, v: F_(q, k, v, return_attn_probs=True)[0], lambda s: s * 8**-0.5),
    "flash_attn qkv": (
        lambda q, k, v: kernels.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), softmax_scale=0.3),
        lambda s: s * 0.3,
    ),
    "flash_attn kv": (
        lambda q, k, v: kernels.flash_attn_kvpacked_func(q, torch.stack([k, v], 2)),
        lambda s: s * 8**-0.5,
    ),
    "flash_attn 3": (lambda q, k, v: kernels._flash_attn_func_3(q, k, v, 0.4), lambda s: s * 0.4),
}
recorded = pytest.mark.parametrize("name", RECORDED)


@recorded
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_kernel_is_recorded_as_its_factors(name: str, no_grad: bool) -> None:
    call, scored = RECORDED[name]
    model, x = Tokens(Calling(call), Attention(fused=True), Calling(call)), images()
    with torch.set_grad_enabled(not no_grad):
        expected = model(x)
        q, k, v = model.blocks[0].split(model.embed(x))
        with capture_attention(model, no_grad=True) as attention:
            for _ in range(2):  # all modules are watched, then those of attention alone
                assert torch.equal(model(x), expected)
                maps = attention.take()
                assert attention.skipped == ()
                assert [layer.name for layer in maps] == ["blocks.0", "blocks.1", "blocks.2"]
                layer = maps[0]
                assert layer.is_factored and layer.kind == "global" and layer.shape == (2, 4, TOKENS, TOKENS)
                torch.testing.assert_close(layer.weights(), scored(q @ k.transpose(-2, -1)).softmax(-1))
                torch.testing.assert_close(layer.output, layer.weights() @ v)
                halves = maps.chunk(2)
                torch.testing.assert_close(torch.cat([h[0].weights() for h in halves]), layer.weights())
                torch.testing.assert_close(torch.cat([h[0].output for h in halves]), layer.output)
            assert modes() == 0
    assert check(model, x).layers[0].product_error < 1e-5


@recorded
def test_gradients_reach_query_and_key_and_come_from_the_logits(name: str) -> None:
    model, x = Tokens(Calling(RECORDED[name][0])), images()
    with capture_attention(model) as attention:
        logits = model(x)
        (layer,) = attention.take()
        loss = layer.weights().square().sum()
        (weight,) = torch.autograd.grad(loss, model.blocks[0].qkv.weight, retain_graph=True)
        assert all(part.abs().max() > 0 for part in weight.chunk(3)[:2])
        (output,) = torch.autograd.grad(logits.sum(), layer.recorded.output)
        assert output.abs().max() > 0
        assert layer.query.data_ptr() == layer.recorded.query.data_ptr(), "a copy"


def test_grouped_heads_and_dropout_are_recorded() -> None:
    model, x = Tokens(Calling(lambda q, k, v: F_(q, k[:, :, :2], v[:, :, :2], 0.5))).train(), images()
    q, k, v = model.blocks[0].split(model.embed(x))
    k, v = (t[:, :2].repeat_interleave(2, 1) for t in (k, v))
    with capture_attention(model) as attention:
        model(x)
        (layer,) = attention.take()
    assert layer.dropout == 0.5
    torch.testing.assert_close(layer.weights(), (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1))
    torch.testing.assert_close(layer.value, v)


def test_loss_and_class_maps_are_those_of_the_fused_kernel() -> None:
    class Classified(Tokens):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__(*blocks)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            for block in self.blocks:
                x = block(x)
            return self.head(x[:, 0])

    ours, x = Classified(Calling(X_), Calling(F_)), images()
    fused = Classified(Attention(fused=True), Attention(fused=True))
    fused.load_state_dict(ours.state_dict())
    losses, gradients, cams = [], [], []
    for model in (ours, fused):
        maps = []
        with capture_attention(model) as attention:
            for each in (x, x.flip(-1)):
                model(each)
                maps.append(attention.take())
            losses.append(affinity_loss()(*maps))
            gradients.append(torch.autograd.grad(losses[-1], model.blocks[0].qkv.weight)[0])
        with GradientCam(model) as cam:
            cams.append(cam(x, torch.ones(2, 5)))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(cams[0], cams[1])
    assert losses[0] > 0 and cams[0].abs().max() > 0


# ---- as codebases call them


def test_the_original_dinov2_is_captured() -> None:
    model, x = Tokens(OriginalDinov2(), OriginalDinov2()), images()
    maps, skipped = captured(model, x)
    assert skipped == {} and [layer.name for layer in maps] == ["blocks.0", "blocks.1"]
    assert all(layer.is_factored for layer in maps)
    assert check(model, x, HorizontalFlip()).problems == ()


def test_hugging_face_vits_with_flash_attention_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers import modeling_flash_attention_utils as utils

    for version in (2, 3, 4):  # of which package to load which functions
        monkeypatch.setattr(utils, f"is_flash_attn_{version}_available", lambda *_, is_it=version == 2, **__: is_it)
    for name, value in vars(utils).items():
        if name == "_loaded_implementation" or name.endswith("_fn"):
            monkeypatch.setattr(utils, name, value)  # so that it is put back
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model, x = transformers.ViTModel(config).eval(), images(size=(32, 32))
    expected = model(x).last_hidden_state
    with capture_attention(model) as attention:
        model(x)
        plain = attention.take()
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(x).last_hidden_state, expected)
    assert utils._flash_fn is kernels.flash_attn_func
    with capture_attention(model) as attention:
        for _ in range(2):
            torch.testing.assert_close(model(x).last_hidden_state, expected)
            maps = attention.take()
            assert [layer.recorded.kernel for layer in maps] == ["flash_attn_func"] * 2
            for ours, theirs in zip(maps, plain, strict=True):
                assert ours.name == theirs.name and ours.layout == theirs.layout
                torch.testing.assert_close(ours.weights(), theirs.weights())


# ---- refused by name


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    return kernels.flash_attn_varlen_func(*flat, starts, starts, q.shape[1], q.shape[1]).view_as(q)


def _varlen_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)
    packed = torch.stack([q, k, v], 2).flatten(0, 1)
    return kernels.flash_attn_varlen_qkvpacked_func(packed, starts, q.shape[1]).view_as(q)


REFUSED = {
    "flash_attn_varlen_func with cu_seqlens_q=": _varlen,
    "flash_attn_varlen_qkvpacked_func with cu_seqlens=": _varlen_packed,
    "flash_attn_with_kvcache with k_cache=": kernels.flash_attn_with_kvcache,
    "attn_bias=BlockDiagonalMask": lambda q, k, v: X_(q, k, v, kernels.BlockDiagonalMask()),
    "attn_bias=LowerTriangularMaskWithTensorBias": (
        lambda q, k, v: X_(q, k, v, kernels.LowerTriangularMaskWithTensorBias())
    ),
    "flash_attn_func with softcap=": lambda q, k, v: F_(q, k, v, softcap=30.0),
    "flash_attn_func with alibi_slopes=": lambda q, k, v: F_(q, k, v, alibi_slopes=torch.ones(4)),
    "memory_efficient_attention of tensors that are not (B, N, H, d)": (
        lambda q, k, v: X_(*(t.unflatten(2, (2, 2)) for t in (q, k, v))).flatten(2, 3)
    ),
    "other numbers of keys than queries": lambda q, k, v: F_(q, k[:, 1:], v[:, 1:], causal=True),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("beside", [True, False], ids=["beside captured layers", "alone"])
def test_what_is_not_recorded_is_refused_by_name_and_the_model_runs(name: str, beside: bool) -> None:
    blocks = [Attention(fused=True)] if beside else []
    model, x = Tokens(*blocks, Calling(REFUSED[name])), images()
    expected = model(x)
    with capture_attention(model) as attention:
        for _ in range(2):
            assert torch.equal(model(x), expected)
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, f"blocks.{len(blocks)}", name)
            assert modes() == 0
    assert torch.equal(model(x), expected)


def test_a_kernel_without_a_second_derivative_is_refused_where_one_is_asked_for() -> None:
    model = Tokens(Calling(X_), Attention(fused=True))
    with capture_attention(model, double_backward=True) as attention:
        model(images())
        with pytest.raises(CaptureError) as error:
            attention.take()
    assert says(error, "blocks.0", "memory_efficient_attention", "second derivative")


def test_a_capture_can_leave_a_refused_kernel_out() -> None:
    model = Tokens(Attention(fused=True), Calling(_varlen))
    with capture_attention(model, modules=["blocks.0"]) as attention:
        model(images())
        assert [layer.name for layer in attention.take()] == ["blocks.0"]


# ---- nothing is changed, and nothing is left behind


def test_functions_and_namespaces_stay_as_they_are() -> None:
    def state() -> list[Any]:
        packages = [sys.modules[name] for name in ("xformers.ops", "flash_attn", "flash_attn_interface")]
        return [dict(vars(package)) for package in packages] + [F_.__code__, F_.__globals__["flash_attn_func"]]

    before, during = state(), []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        during.append(state())
        return F_(q, k, v)

    with capture_attention(Tokens(Calling(attend))) as attention:
        attention._recorder.index.model(images())
    assert during == [before] and state() == before


@cold_and_warm
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["within", "before"])
def test_a_forward_that_ends_early_leaves_no_profile_function(
    warm: bool, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fails and where == "before":
            raise error
        return F_(q, k, v)

    def opaque(*args: Any) -> Tensor:
        if fails:
            raise error
        return plain(*args)

    plain = kernels._attend
    monkeypatch.setattr(kernels, "_attend", opaque)
    model, x = Tokens(Calling(attend)), images()
    with capture_attention(model) as attention:
        if warm:
            model(x)
            attention.take()
        fails.append(1)
        with pytest.raises(error):
            model(x)
        fails.clear()
        model(x)
        assert len(attention.take()) == 1
        assert sys.getprofile() is None and modes() == 0


def test_other_threads_are_not_watched() -> None:
    seen: list[Any] = []
    within, done = threading.Event(), threading.Event()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        within.set()
        assert done.wait(60)
        return F_(q, k, v)

    def elsewhere() -> None:
        assert within.wait(60)
        seen.append(sys.getprofile())
        t = torch.randn(1, 5, 4, 8)
        seen.append(F_(t, t, t))
        done.set()

    model = Tokens(Calling(attend))
    thread = threading.Thread(target=elsewhere)
    with capture_attention(model) as attention:
        thread.start()
        model(images())
        thread.join()
        assert len(attention.take()) == 1
    assert seen[0] is None and seen[1].shape == (1, 5, 4, 8)


def test_two_captures_record_the_same() -> None:
    model, x = Tokens(Calling(F_), Calling(X_)), images()
    for first, second in ((0, 1), (1, 0)):
        captures = [capture_attention(model), capture_attention(model)]
        for _ in range(2):
            model(x)
            one, two = (attention.take() for attention in captures)
            assert all(torch.equal(a, b) for a, b in zip(one.weights(), two.weights(), strict=True))
        captures[first].remove()
        model(x)
        assert len(captures[second].take()) == 2
        captures[second].remove()
        assert sys.getprofile() is None


def test_a_capture_removed_within_a_forward_leaves_no_profile_function() -> None:
    for order in ((0, 1), (1, 0)):
        captures: list[Any] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, order: Any = order, captures: Any = captures) -> Tensor:
            for i in order:
                captures[i].remove()
            assert sys.getprofile() is None
            return F_(q, k, v)

        model = Tokens(Calling(attend))
        captures += [capture_attention(model), capture_attention(model)]
        model(images())
        assert sys.getprofile() is None and modes() == 0


def test_a_profile_function_of_the_users_goes_on() -> None:
    events: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if frame.f_code is F_.__code__:
            events.append(event)

    model = Tokens(Calling(F_))
    with capture_attention(model) as attention:
        sys.setprofile(profile)
        try:
            model(images())
            assert sys.getprofile() is profile
        finally:
            sys.setprofile(None)
        assert len(attention.take()) == 1
    assert events[0] == "call" and "return" in events


def test_under_a_profiler_in_c_the_kernels_are_refused_or_recorded() -> None:
    """Before Python 3.12 cProfile takes the place of the profile function."""
    model, x = Tokens(Calling(F_), Attention(fused=True), Calling(F_)), images()
    with capture_attention(model) as attention:
        model(x)
        attention.take()
        profiler = cProfile.Profile()
        profiler.enable()
        try:
            output = model(x)
        finally:
            profiler.disable()
        if sys.version_info < (3, 12):
            with pytest.raises(CaptureError, match=r"blocks\.0.*flash_attn"):
                attention.take()
        else:
            assert len(attention.take()) == 3
        assert torch.equal(model(x), output)
        assert len(attention.take()) == 3
        assert any(code == F_.__code__ for code, *_ in (entry[:1] for entry in profiler.getstats()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_captured_or_refused_as_with_other_kernels(reentrant: bool) -> None:
    class Checkpointed(Calling):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)  # type: ignore[return-value]

    model, x = Tokens(Checkpointed(F_), Attention(fused=True)), images()
    model(x).sum().backward()
    expected = model.blocks[0].qkv.weight.grad.clone()
    model.zero_grad()
    with capture_attention(model) as attention:
        for _ in range(2):
            output = model(x)
            if reentrant:
                with pytest.raises(CaptureError, match="use_reentrant=False"):
                    attention.take()
            else:
                assert len(attention.take()) == 2
            output.sum().backward()
            assert torch.equal(model.blocks[0].qkv.weight.grad, expected)
            model.zero_grad()


def test_a_frozen_model_starts_its_graph_at_the_kernel() -> None:
    model, x = Tokens(Calling(F_), Calling(X_)), images()
    for block in (model.patches, *model.blocks):
        block.requires_grad_(False)
    with capture_attention(model, graph_from=1) as attention:
        logits = model(x)
        first, second = attention.take()
        assert not first.recorded.output.requires_grad
        (gradient,) = torch.autograd.grad(logits.sum(), second.recorded.output)
        assert gradient.abs().max() > 0


def test_without_the_packages_no_profile_function_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in ("xformers", "flash_attn", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)
    seen: list[Any] = []

    class Looking(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append((sys.getprofile(), modes()))
            return super().attend(q, k, v)

    with capture_attention(Tokens(Looking())) as attention:
        attention._recorder.index.model(images())
    assert seen == [(None, 1)]
