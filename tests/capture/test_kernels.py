"""Kernels and tensors that leave nothing to record: the model runs as without a capture, and they are named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import CaptureError, capture_attention
from tests.support.attention import says
from tests.support.capturing import images, modes
from tests.support.models import explicit_vit, multihead_vit
from tests.support.models.plain import Builder, FunctionAttention, PlainEncoder, fused_attention
from tests.support.models.tokens import GRID, Attention, Tokens

recent = pytest.mark.skipif(torch.__version__ < (2, 6), reason="older torch fails by itself")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch's own forward derivatives
]
TOKENS = GRID[0] * GRID[1]


def _padded(tensor: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor


def refused_in_every_run(model: nn.Module, run: Callable[[], Tensor], *named: str) -> None:
    expected = run()
    with capture_attention(model, no_grad=True) as attention:
        for _ in range(2):  # all modules are watched, then those of attention alone
            torch.testing.assert_close(_padded(run()), _padded(expected))
            with pytest.raises(CaptureError) as error:
                attention.take()
            assert says(error, *named)
            assert modes() == 0
    torch.testing.assert_close(_padded(run()), _padded(expected))


def captured_in_every_run(model: nn.Module, run: Callable[[], Tensor], layers: int = 2) -> None:
    expected = run()
    with capture_attention(model, no_grad=True) as attention:
        for _ in range(2):
            torch.testing.assert_close(run(), expected)
            maps = attention.take()
            assert len(maps) == layers and attention.skipped == ()
            assert all((layer.weights().sum(-1) - 1).abs().max() < 1e-5 for layer in maps)
            assert modes() == 0


# ---- flex_attention, which compiles itself

flex: Any = None
if hasattr(torch.nn, "attention"):
    with suppress(ImportError):  # torch < 2.5
        from torch.nn.attention import flex_attention as flex


def with_flex(test: Any) -> Any:
    test = pytest.mark.skipif(flex is None, reason="torch < 2.5 has no flex_attention")(test)
    test = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse")(test)
    return pytest.mark.usefixtures("fresh_dynamo")(test)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _with_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.where(query >= key, score * 2 + (query - key), -torch.inf)


FLEX: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "alone": lambda q, k, v: flex.flex_attention(q, k, v),
    "score_mod": lambda q, k, v: flex.flex_attention(q, k, v, score_mod=_with_bias),
    "return_lse": lambda q, k, v: flex.flex_attention(q, k, v, return_lse=True)[0],
    "enable_gqa": lambda q, k, v: flex.flex_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "block_mask": lambda q, k, v: flex.flex_attention(
        q,
        k,
        v,
        block_mask=flex.create_block_mask(lambda _b, _h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu"),
    ),
}


@with_flex
@pytest.mark.parametrize("name", FLEX)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a captured layer"])
def test_flex_attention_runs_and_is_refused_by_name(name: str, beside: bool) -> None:
    class ByFlex(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return FLEX[name](q, k, v)

    model, x = Tokens(*[Attention(fused=True)] * beside, ByFlex()), images()
    with torch.no_grad():  # torch has no backward of it on a CPU
        refused_in_every_run(model, lambda: model(x), f"blocks.{int(beside)}", "flex_attention")


@with_flex
def test_compiled_flex_attention_is_refused_by_name() -> None:
    class ByCompiled(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.compile(flex.flex_attention, backend="eager")(q, k, v)

    model = Tokens(ByCompiled())
    with torch.no_grad(), capture_attention(model, no_grad=True) as attention:
        model(images())
        with pytest.raises(CaptureError, match="flex_attention"):
            attention.take()


def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device != k.device or q.dtype != v.dtype or min(q.dim(), k.dim()) < 2:
        raise ValueError
    return F.scaled_dot_product_attention(q, k, v)


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device != k.device or min(q.dim(), k.dim()) < 2:
        raise ValueError
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def after_a_break(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return checked(q, k, v)


@pytest.mark.parametrize("attend", [checked, spelled_out, after_a_break])
def test_a_compiled_function_in_a_model_is_captured_and_the_mode_is_not_compiled(
    attend: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """torch would take one function that the mode hands on for another, and compile the mode for each."""

    class ByCompiled(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.compile(attend, backend="eager")(q, k, v)

    torch._dynamo.reset()
    model, x = Tokens(ByCompiled()), images()
    with torch.no_grad():  # else torch warns of the gradients that it looks for
        captured_in_every_run(model, lambda: model(x), layers=1)
    assert "recompile_limit" not in caplog.text


# ---- torch.vmap and the other transforms of torch.func


def fused_vit() -> nn.Module:
    return PlainEncoder(nn.Sequential(*(FunctionAttention(fused_attention) for _ in range(2))))


BUILDS = {"fused": fused_vit, "explicit": explicit_vit, "multi-head": multihead_vit}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def _of_parameters(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, image: torch.func.functional_call(model, parameters, (image[None],)).sum()


def _each_image(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda image: model(image[None])[0])(x)


def _gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(_of_parameters(model, x))(dict(model.named_parameters()), x[0])["head.weight"]


def _gradient_of_each_image(model: nn.Module, x: Tensor) -> Tensor:
    of_each = torch.vmap(torch.func.grad(_of_parameters(model, x)), (None, 0))
    return of_each(dict(model.named_parameters()), x)["head.weight"]


def _ensemble(model: nn.Module, x: Tensor) -> Tensor:
    stacked = torch.func.stack_module_state([model, copy.deepcopy(model)])
    return torch.vmap(lambda *state: torch.func.functional_call(model, state, (x,)))(*stacked)


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(lambda image: model(image).sum(0))(x)  # type: ignore[no-any-return]


@recent
@every_build
@pytest.mark.parametrize("run", [_each_image, _gradient, _gradient_of_each_image, _ensemble, _jacobian])
def test_a_run_under_a_transform_of_torch_func_is_refused_by_name(
    build: Builder, run: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model, x = build().eval(), images()
    refused_in_every_run(model, lambda: run(model, x), "encoder.0", "torch.vmap", "torch.func")


@recent
def test_forward_derivatives_by_torch_func_are_refused_by_name() -> None:
    model, x = explicit_vit(), images()
    run = torch.func.jvp
    refused_in_every_run(model, lambda: run(model, (x,), (torch.ones_like(x),))[1], "softmax under torch.vmap")


def test_one_layer_under_vmap_is_refused_by_name() -> None:
    class EachHead(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.vmap(F.scaled_dot_product_attention, 1, 1)(q, k, v)

    class ProductOfEachHead(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attention = (q @ k.transpose(-2, -1)).softmax(-1)
            return torch.vmap(lambda value: attention[:, 0] @ value, 1, 1)(v)

    for block, named in (
        (EachHead(), "scaled_dot_product_attention under torch.vmap"),
        (ProductOfEachHead(), "matmul"),
    ):
        model, x = Tokens(Attention(), block), images()
        refused_in_every_run(model, lambda model=model, x=x: model(x), "blocks.1", named)


@every_build
def test_derivatives_that_transform_nothing_are_captured(build: Builder) -> None:
    model, x = build().eval(), images()
    captured_in_every_run(model, lambda: torch.func.functional_call(model, dict(model.named_parameters()), (x,)))
    for vectorize in (False, True):  # vmap of the backward alone
        captured_in_every_run(
            model,
            lambda vectorize=vectorize: torch.autograd.functional.jacobian(
                lambda image: model(image).sum(0), x, vectorize=vectorize
            ),
        )


def test_forward_mode_differentiation_is_captured() -> None:
    import torch.autograd.forward_ad as forward_ad

    model, x = explicit_vit(), images()

    def run() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    captured_in_every_run(model, run)


# ---- tensors that are not dense


def nested(layout: torch.layout = torch.strided, width: int = 32) -> Tensor:
    return torch.nested.nested_tensor([torch.rand(16, width), torch.rand(8, width)], layout=layout)


jagged = pytest.mark.skipif(not hasattr(torch, "jagged"), reason="torch 2.1 has no jagged layout")


@jagged
def test_norms_of_heads_of_jagged_tensors_run() -> None:
    """(B, ragged N, heads, d): four axes, of which an image has as many."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(tokens.unflatten(-1, (4, 8)))

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, tokens: Tensor) -> Tensor:
            self.norm(torch.nested.nested_tensor(list(tokens), layout=torch.jagged))
            return tokens

    model, tokens = Norm(), nested(torch.jagged)
    refused_in_every_run(model, lambda: model(tokens).flatten(2), "Norm")
    vit, x = Tokens(Attention(), Beside(), Attention(fused=True)), images()
    captured_in_every_run(vit, lambda: vit(x))


class NestedAttention(nn.Module):
    """Of (B, N, C): as nested tensors, through one kernel, and back."""

    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.kernel = nn.Linear(32, 32), kernel

    def forward(self, tokens: Tensor) -> Tensor:
        each = torch.nested.nested_tensor(list(self.query(tokens).unflatten(-1, (4, 8)).transpose(1, 2)))
        return tokens + torch.stack(list(self.kernel(each).unbind())).transpose(1, 2).flatten(2)


KERNELS = {
    "scaled_dot_product_attention": lambda q: F.scaled_dot_product_attention(q, q, q),
    "softmax": lambda q: torch.matmul(torch.softmax(torch.matmul(q, q.transpose(-2, -1)), -1), q),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("no_grad", [False, True])
def test_attention_of_nested_tensors_runs_and_is_refused_by_name(kernel: str, no_grad: bool) -> None:
    model, x = Tokens(Attention(), NestedAttention(KERNELS[kernel])), images()
    with torch.set_grad_enabled(not no_grad):
        try:
            model(x)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this torch does not run it: {str(error)[:60]}")
        refused_in_every_run(model, lambda: model(x), "blocks.1", f"{kernel} of nested or sparse tensors")


@recent
@pytest.mark.parametrize("within", [False, True])
def test_multi_head_attention_of_nested_tensors_runs_and_is_refused_by_name(within: bool) -> None:
    """torch refuses to run it under a function mode."""

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            return self.attend(query=q, key=k, value=v, **options)

    model = (Within() if within else nn.MultiheadAttention(32, 4, batch_first=True)).eval()
    tokens = nested()
    with torch.no_grad():
        refused_in_every_run(
            model,
            lambda: model(tokens, tokens, tokens, need_weights=False)[0],
            "multi_head_attention_forward of nested tensors",
        )


def test_an_encoder_that_would_nest_padded_tokens_is_captured_in_every_run() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 32, 8, 8)
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
            padding[0, 20:] = True
            return self.encoder(tokens, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)

    model, x = Padded().eval(), images()
    with torch.no_grad():
        captured_in_every_run(model, lambda: model(x))


class LikeTorch21(nn.TransformerEncoderLayer):
    """Passes over the hooks of its attention where no mode is on, as the kernel of the whole layer does there."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.overrides.has_torch_function((src,)):
            return super().forward(src, *args, **kwargs)
        tokens = self.norm1(src + self.self_attn.forward(src, src, src, need_weights=False)[0])
        return self.norm2(tokens + self.linear2(self.linear1(tokens).relu()))


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, LikeTorch21])
@pytest.mark.parametrize("stacked", [True, False])
def test_an_encoder_layer_with_a_kernel_of_its_own_is_captured_in_every_run(kind: type, stacked: bool) -> None:
    layer = kind(32, 4, 64, dropout=0.0, batch_first=True)
    stack = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)] if stacked else [layer, copy.deepcopy(layer)]
    model, x = Tokens(*stack).eval(), images()
    with torch.no_grad():
        captured_in_every_run(model, lambda: model(x))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    captured_in_every_run(model, lambda: model(x))


def test_maps_that_become_sparse_break_nothing() -> None:
    class Sparse(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attention = (q @ k.transpose(-2, -1)).softmax(-1)
            attention.to_sparse().to_dense()
            return attention @ v

    class SparseOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(32, 32)

        def forward(self, tokens: Tensor) -> Tensor:
            q = self.query(tokens[0])
            return torch.sparse.mm(torch.sparse.softmax((q @ q.T).to_sparse(), 1), q)[None]

    model, x = Tokens(Sparse(), Attention(fused=True)), images()
    captured_in_every_run(model, lambda: model(x))
    model = Tokens(SparseOnly())
    refused_in_every_run(model, lambda: model(x), "Tokens")

    class ThenSparse(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attention = (q @ k.transpose(-2, -1)).softmax(-1)[:, 0].to_sparse()
            return torch.stack([torch.bmm(attention, v[:, head]) for head in range(4)], 1)

    model = Tokens(Attention(), ThenSparse())
    refused_in_every_run(model, lambda: model(x), "blocks.1", "bmm of nested or sparse tensors")


def test_complex_queries_are_captured() -> None:
    class Rotated(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            turned = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous()) * torch.tensor(1j)
            return (torch.view_as_real(turned).flatten(-2) @ k.transpose(-2, -1)).softmax(-1) @ v

    model, x = Tokens(Rotated(), Rotated()), images()
    captured_in_every_run(model, lambda: model(x))


@every_build
def test_models_on_the_meta_device_are_captured(build: Builder) -> None:
    with torch.device("meta"):
        model, x = build(), images()
    with capture_attention(model) as attention:
        for _ in range(2):
            assert model(x).shape == (2, 5)
            assert [layer.shape for layer in attention.take()] == [(2, 4, 25, 25)] * 2


@every_build
def test_tensors_without_data_run_and_are_not_captured(build: Builder) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = build()
        with capture_attention(model) as attention:
            for _ in range(2):
                assert model(torch.empty(2, 3, 32, 48)).shape == (2, 5)
                with pytest.raises(CaptureError, match="No token-to-token attention"):
                    attention.take()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
def test_quantised_linear_maps_are_captured() -> None:
    plain = explicit_vit().eval()
    model, x = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8), images()
    captured_in_every_run(model, lambda: model(x))
