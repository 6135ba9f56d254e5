"""What a capture says of each kind of attention: global, windows, reduced keys or queries, or none between tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    CaptureError,
    HorizontalFlip,
    LayoutError,
    VerticalFlip,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from acr_reg.alignment.pairs import align_layer
from tests.support.attention import says

GRID = (4, 6)
SIZE = (32, 48)  # px: patches of 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size)


# ---- models


class Tokens(nn.Module):
    """Patches of an image as tokens (B, N, C), through blocks and on to 5 logits. There is no class token."""

    def __init__(self, *blocks: nn.Module, width: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 5)

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Self-attention over (..., N, C), fused or by hand; ``seen`` is the map by hand, as it met the values."""

    def __init__(self, width: int = 32, heads: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.fused = heads, fused
        self.parts = heads  # the same, under a name that says nothing
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.seen: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (..., H, N, d)."""
        return self.qkv(x).unflatten(-1, (3, self.parts, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        self.seen = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.seen @ v

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(self.attend(*self.split(x)))


class Windows(nn.Module):
    """Attention within windows of the grid of (B, N, C), padded to whole windows; ``axes`` says where they lie."""

    def __init__(
        self,
        window: tuple[int, int] = (2, 3),
        shift: tuple[int, int] = (0, 0),
        axes: str = "batch",
        fused: bool = False,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.axes = window, shift, axes
        self.attn = (HeadsFirst if axes == "heads, windows" else Attention)(heads=heads, fused=fused)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (wh, ww) = GRID, self.window_size
        grid = F.pad(x.unflatten(1, GRID), (0, 0, 0, -width % ww, 0, -height % wh))
        grid = grid.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        split = grid.unflatten(2, (-1, ww)).unflatten(1, (-1, wh)).transpose(2, 3)  # (B, nh, nw, wh, ww, C)
        groups = split.flatten(3, 4)
        y = self.attn(groups.flatten(0, 2) if self.axes == "batch" else groups.flatten(1, 2))
        grid = y.reshape(split.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(self.shift_size, (1, 2))
        return grid[:, :height, :width].flatten(1, 2)


class HeadsFirst(Attention):
    """Maps (B, H, windows, N, N) of (B, windows, N, C), where the order of ``Attention`` is (B, windows, H, N, N)."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2) for t in super().split(x))

    def join(self, x: Tensor) -> Tensor:
        return super().join(x.transpose(1, 2))


class ReducedKeys(Attention):
    """Keys and values of a grid ``by`` times coarser, as in PVT and SegFormer; queries from all tokens."""

    def __init__(self, grid: tuple[int, int] = GRID, by: int = 2, **kwargs: int) -> None:
        super().__init__(**kwargs)
        self.grid = grid
        self.reduce = nn.Conv2d(self.proj.in_features, self.proj.in_features, by, by)

    def others(self, x: Tensor) -> Tensor:
        return self.reduce(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(self.attend(self.split(x)[0], *self.split(self.others(x))[1:]))


# ---- what is done with them


def captured(model: nn.Module, x: Tensor, checks: bool = True) -> tuple[AttentionMaps, dict[str, str]]:
    """The maps of a second forward, which only attention modules are watched in, and what was skipped by name.

    The first forward, in which every module is watched, must say the same, but for softmaxes that never met values:
    nothing watches their modules afterwards. With ``checks``, weights @ V is held against the model's own product.
    """
    with capture_attention(model, record_products=checks) as attention:
        model(x)
        first, reasons = attention.take(), dict(attention.skipped)
        model(x)
        maps, skipped = attention.take(), dict(attention.skipped)
    seen_again = {name: reason for name, reason in reasons.items() if "met no values" not in reason}
    assert seen_again.items() <= skipped.items() <= reasons.items()
    assert [describe(layer) for layer in maps] == [describe(layer) for layer in first]
    for layer in maps:
        weights = layer.weights()
        if layer.stochastic:
            assert (weights.sum(-1) - 1).abs().max() < 1e-5
            assert weights.min() >= 0
        value = layer.value
        if checks and value is not None and layer.dropout == 0:
            output = layer.output
            assert output is not None
            assert (weights.to(value) @ value - output).norm() < 1e-5 * output.norm()
    return maps, reasons


def describe(layer):
    return (
        layer.index,
        layer.name,
        layer.kind,
        layer.shape,
        str(layer.window),
        layer.placed or layer.why_unplaced,
        layer.stochastic,
    )


def kinds(maps: AttentionMaps) -> list[str]:
    return [layer.kind for layer in maps]


def grids(layer) -> tuple[tuple[int, int], tuple[int, int]]:
    query, key = layer.layout.query, layer.layout.key
    return (query.height, query.width), (key.height, key.width)


def nothing_captured(model: nn.Module, x: Tensor) -> pytest.ExceptionInfo[CaptureError]:
    with capture_attention(model) as attention:
        model(x)
        with pytest.raises(CaptureError, match="No token-to-token attention") as error:
            attention.take()
    assert says(error, type(model).__name__)
    return error


def affinity_loss(view=None, **kwargs) -> AllPairsConsistencyLoss:
    return AllPairsConsistencyLoss(view or HorizontalFlip(), activation_weight=0, **kwargs)


def refusal_of_the_loss(maps: AttentionMaps, **kwargs) -> pytest.ExceptionInfo[LayoutError]:
    with pytest.raises(LayoutError) as error:
        affinity_loss(**kwargs)(maps, maps)
    return error


# ---- windows


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
@pytest.mark.parametrize("axes", ["batch", "windows, heads", "heads, windows"])
@pytest.mark.parametrize("heads", [2, 8], ids=["more windows than heads", "fewer windows than heads"])
def test_windows_are_told_from_the_batch_or_a_fifth_axis(axes: str, fused: bool, heads: int) -> None:
    model = Tokens(Windows(shift=(1, 1), axes=axes, fused=fused, heads=heads))
    maps, skipped = captured(model, images())
    assert skipped == {}
    (layer,) = maps
    assert layer.kind == "window"
    assert (layer.window.size, layer.window.shift, layer.window.per_image) == ((2, 3), (1, 1), 4)
    assert layer.name == "blocks.0.attn"
    assert layer.is_factored == fused
    assert layer.shape == ((8, heads, 6, 6) if axes == "batch" else (2, 4 * heads, 6, 6))


@pytest.mark.parametrize("axes", ["batch", "windows, heads", "heads, windows"])
def test_maps_of_windows_are_those_the_model_computed(axes: str) -> None:
    """By hand the very tensor, fused to rounding; both with a gradient to queries and keys and from the logits."""
    by_hand, fused = (Tokens(Windows(axes=axes, fused=kind)) for kind in (False, True))
    fused.load_state_dict(by_hand.state_dict())
    x = images()
    with capture_attention(by_hand) as one, capture_attention(fused) as two:
        logits = by_hand(x)
        (layer,) = one.take()
        expected = by_hand.blocks[0].attn.seen
        assert torch.equal(layer.weights().flatten(), expected.flatten())
        (gradient,) = torch.autograd.grad(logits.sum(), layer.recorded.map, retain_graph=True)
        assert gradient.abs().max() > 0
        fused(x)
        (other,) = two.take()
        torch.testing.assert_close(other.weights(), layer.weights(), rtol=0, atol=1e-6)
        for model, found in ((by_hand, layer), (fused, other)):
            (gradient,) = torch.autograd.grad(found.weights()[..., 0].sum(), model.blocks[0].attn.qkv.weight)
            assert all(part.abs().max() > 0 for part in gradient.chunk(3)[:2])


@pytest.mark.parametrize("axes", ["windows, heads", "heads, windows"])
def test_windows_on_a_fifth_axis_without_a_word_about_heads(axes: str) -> None:
    block = Windows(axes=axes)
    del block.attn.num_heads
    (layer,) = captured(Tokens(block), images())[0]
    assert layer.kind == "window"
    assert layer.window.per_image == 4


@pytest.mark.parametrize(
    ("window", "shift", "size", "shown"),
    [
        ((2, 2), (0, 0), (2, 2), "6 windows of 2 x 2"),
        ((2, 3), (1, 0), (2, 3), "4 windows of 2 x 3, shifted by 1 x 0"),
        ((4, 2), (0, 1), (4, 2), "3 windows of 4 x 2, shifted by 0 x 1"),
        ((3, 4), (0, 0), (3, 4), "4 windows of 3 x 4"),  # padded to 6 x 8
    ],
)
def test_size_and_shift_are_read_off_the_modules_around(window, shift, size, shown) -> None:
    (layer,) = captured(Tokens(Windows(window, shift)), images())[0]
    assert layer.window.size == size
    assert str(layer.window) == shown


def test_a_window_size_as_one_number_and_a_shift_that_only_one_block_has() -> None:
    first, second = Windows((2, 2)), Windows((2, 2), (1, 1))
    for block in (first, second):
        block.attn.window_size = 2  # the innermost module that says it goes first
    maps, _ = captured(Tokens(first, second), images())
    assert [layer.window.size for layer in maps] == [(2, 2), (2, 2)]
    assert [layer.window.shift for layer in maps] == [(0, 0), (1, 1)]


def test_a_size_that_is_not_that_of_the_windows_is_not_told() -> None:
    block = Windows((2, 3))
    block.attn.window_size = 49  # a number of tokens, as some models say it, or something else altogether
    (layer,) = captured(Tokens(block), images())[0]
    assert layer.window.size is None
    assert layer.window.per_image == 4
    assert str(layer.window) == "4 windows"


def test_one_window_larger_than_the_grid_is_padded() -> None:
    """49 tokens for a grid of 4 x 6: some of them stand for nothing, so it is no map of the whole image."""
    (layer,) = maps = captured(Tokens(Windows((7, 7))), images())[0]
    assert (layer.kind, layer.window.size, layer.window.per_image) == ("window", (7, 7), 1)
    assert says(refusal_of_the_loss(maps), "windows of 7 x 7")


def test_one_window_of_the_whole_grid_is_global() -> None:
    (layer,) = maps = captured(Tokens(Windows(GRID)), images())[0]
    assert layer.kind == "global"
    assert grids(layer) == (GRID, GRID)
    assert affinity_loss()(maps, maps) > 0


def test_parts_of_the_batch_keep_the_windows_of_their_images() -> None:
    model, a, b = Tokens(Windows(), Attention(), Windows(axes="windows, heads")), images(3), images(3)
    with capture_attention(model) as attention:
        model(torch.cat([a, b]))
        both = attention.take()
        parts = both.chunk(2)
        assert both.batch_size == 6
        assert parts[1].batch_size == 3
        for x, part in zip((a, b), parts, strict=True):
            model(x)
            for alone, layer in zip(attention.take(), part, strict=True):
                assert layer.kind == alone.kind
                assert layer.shape == alone.shape
                torch.testing.assert_close(layer.weights(), alone.weights(), rtol=0, atol=1e-6)


def only_windows() -> nn.Module:
    return Tokens(Windows(), Windows((2, 3), (1, 1)))


def windows_and_global() -> nn.Module:
    return Tokens(Windows(), Attention(), Windows((2, 3), (1, 1)), Attention(fused=True))


def test_the_loss_refuses_windows_by_name_and_lists_the_layers_to_use() -> None:
    maps, _ = captured(windows_and_global(), images())
    assert kinds(maps) == ["window", "global", "window", "global"]
    error = refusal_of_the_loss(maps)
    assert says(error, "layer 0 (blocks.0.attn)", "4 windows of 2 x 3 (6 tokens each)", "Choose layers=[1, 3]")
    error = refusal_of_the_loss(maps, layers=[1, 2])
    assert says(error, "layer 2 (blocks.2.attn)", "shifted by 1 x 1", "Choose layers=[1, 3]")


def test_where_every_layer_is_of_windows_the_message_does_not_send_in_circles() -> None:
    maps, _ = captured(only_windows(), images())
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0.attn)", "4 windows of 2 x 3", "No layer here does")


def test_labels_and_class_maps_do_not_hide_why_windows_are_refused() -> None:
    maps, _ = captured(only_windows(), images())
    with pytest.raises(LayoutError) as error:
        affinity_loss()(maps, maps, labels=torch.ones(2, 5))
    assert says(error, "layer 0 (blocks.0.attn)", "4 windows of 2 x 3")
    cams = torch.rand(2, 5, *GRID, requires_grad=True)
    with pytest.raises(LayoutError) as error:
        affinity_loss()(maps, maps, cams, cams)
    assert says(error, "layer 0 (blocks.0.attn)", "4 windows of 2 x 3")


def test_layers_without_a_grid_are_not_among_those_to_use_instead() -> None:
    """Windows are beside the point for tokens in the order of mask units: a global layer is of no use either."""
    maps, _ = captured(Tokens(Windows(), Unroll(), Attention()), images())
    assert kinds(maps) == ["window", "global"]
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0.attn)", "No layer here does")


@pytest.mark.parametrize("query", ["class", "all"])
@pytest.mark.parametrize("build", [windows_and_global, only_windows])
def test_a_gradient_class_map_refuses_windows_by_name(build: Callable[[], nn.Module], query: str) -> None:
    model = build()
    with capture_attention(model) as attention:
        logits = model(images())
        maps = attention.take()
        with pytest.raises(LayoutError) as error:
            class_token_gradient_cam(logits, maps, start_layer=0, query=query)
        advice = "Choose layers=[1, 3]" if build is windows_and_global else "No layer here does"
        assert says(error, "layer 0 (blocks.0.attn)", "4 windows of 2 x 3", advice)


@pytest.mark.parametrize("build", [windows_and_global, only_windows])
def test_propagation_refuses_windows_by_name(build: Callable[[], nn.Module]) -> None:
    maps, _ = captured(build(), images())
    cam = torch.rand(maps.batch_size, 5, *GRID)
    for layers in (None, [0], [-2]):
        with pytest.raises(LayoutError) as error:
            propagate_cam(cam, maps, layers=layers)
        named = re.search(r"layer (\d) \((blocks\.\d\.attn)\)", str(error.value))
        assert maps[int(named[1])].name == named[2]
        assert maps[int(named[1])].kind == "window"
        assert says(error, "4 windows of 2 x 3")


def test_the_global_layers_among_windows_serve() -> None:
    model, view, x = windows_and_global(), HorizontalFlip(), images()
    with capture_attention(model, layers=[1, 3]) as attention:
        logits = model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    assert affinity_loss()(a, b) > 0
    with capture_attention(model) as attention:
        logits = model(x)
        everything = attention.take()
        model(view(x))
        assert torch.equal(affinity_loss(layers=[1, 3])(everything, attention.take()), affinity_loss()(a, b))
    for chosen, start in ((everything, -1), (everything.select([1, 3]), 0)):
        cam = class_token_gradient_cam(logits, chosen, start_layer=start, query="all")
        assert cam.shape == (2, 5, *GRID)
        assert cam.abs().max() > 0
    expected = sum(layer.weights().mean(1) for layer in a) @ cam.flatten(2).transpose(1, 2)
    found = propagate_cam(cam, everything, layers=[1, 3])
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


# ---- reduced keys, reduced queries


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
def test_reduced_keys_have_a_grid_of_their_own(fused: bool) -> None:
    (layer,) = maps = captured(Tokens(ReducedKeys(fused=fused)), images())[0]
    assert layer.kind == "reduced keys"
    assert layer.shape == (2, 4, 24, 6)
    assert grids(layer) == (GRID, (2, 3))
    assert layer.layout.query.stride == (8.0, 8.0)
    assert layer.layout.key.stride == (16.0, 16.0)
    assert layer.layout.key.extent == layer.layout.query.extent == (32.0, 48.0)
    assert layer.layout.num_prefix_tokens == 0
    assert "24 queries, 6 keys: 0 prefix + 4 x 6" in repr(maps)
    assert affinity_loss()(maps, maps) > 0


class Pyramid(nn.Module):
    """PVT-like: stages on ever coarser grids, the keys of the early ones reduced, of the last one not."""

    def __init__(self, reductions: Sequence[int] = (4, 2, 1), patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.ModuleList([nn.Conv2d(3, 32, patch, patch)])
        self.patches += [nn.Conv2d(32, 32, 2, 2) for _ in reductions[1:]]
        self.attention = nn.ModuleList(ReducedKeys(by=by) if by > 1 else Attention() for by in reductions)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for patches, attention in zip(self.patches, self.attention, strict=True):
            x = patches(x)
            attention.grid = x.shape[2:]
            x = attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(x.mean((2, 3)))


def test_every_stage_of_a_pyramid_has_its_grids() -> None:
    maps, _ = captured(Pyramid(), images(size=(64, 96)))
    assert kinds(maps) == ["reduced keys", "reduced keys", "global"]
    assert [grids(layer) for layer in maps] == [((16, 24), (4, 6)), ((8, 12), (4, 6)), ((4, 6), (4, 6))]
    assert [layer.layout.query.stride[0] for layer in maps] == [4, 8, 16]
    assert [layer.layout.key.stride[0] for layer in maps] == [16, 16, 16]
    assert affinity_loss()(maps, maps) > 0


def mirrored(model: nn.Module) -> nn.Module:
    """Every kernel its own mirror image, so that the model commutes with a horizontal flip; and sharp attention."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2
        elif isinstance(module, Attention):
            module.qkv.weight.data[: 2 * module.proj.in_features] *= 24
    return model.double()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: Tokens(ReducedKeys(by=2)), SIZE),
        (lambda: Pyramid((4, 2, 1)), SIZE),
        (lambda: Pyramid((8, 4, 2, 1)), (64, 96)),  # SegFormer's; 16 x 24 is 2 x 3 by steps of 7 too
    ],
    ids=["one stage", "three stages", "four stages"],
)
def test_reduced_keys_are_aligned_on_both_grids(
    build: Callable[[], nn.Module], size: tuple[int, int], fused: bool
) -> None:
    """A model that commutes with the flip attends to the mirrored keys; one frame taken for another is far off."""
    model, view, x = mirrored(build()), HorizontalFlip(), images(size=size).double()
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = fused
    with capture_attention(model) as attention:
        model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    assert "reduced keys" in kinds(a)
    for one, other in zip(a, b, strict=True):
        assert (one.weights() - other.weights()).abs().max() > 0.1  # else there is nothing to align
        layer = align_layer(one, other, view)
        assert (layer.affinity.a - layer.affinity.b).abs().max() < 1e-6
    assert affinity_loss(view)(a, b) < 1e-6
    assert affinity_loss(VerticalFlip())(a, b) > 0.02
    assert affinity_loss(VerticalFlip())(a, b) > 1e4 * affinity_loss(view)(a, b)


def test_a_gradient_class_map_over_all_queries_lies_on_the_reduced_keys() -> None:
    model = Tokens(ReducedKeys())
    with capture_attention(model) as attention:
        logits, maps = model(images()), attention.take()
        cam = class_token_gradient_cam(logits, maps, start_layer=0, query="all")
        assert cam.shape == (2, 5, 2, 3)
        gradient = torch.autograd.grad(logits[:, 3].sum(), maps[0].recorded.map)[0]
    torch.testing.assert_close(cam[:, 3].flatten(1), gradient.relu().mean((1, 2)))


def test_propagation_over_reduced_keys_is_refused_by_name() -> None:
    """Its map would come back on the grid of the queries, in rows of the keys'."""
    maps, _ = captured(Tokens(ReducedKeys(), Attention()), images())
    for grid, layers in (((2, 3), [0]), (GRID, None)):
        with pytest.raises(ValueError, match=r"layers \[0\]") as error:
            propagate_cam(torch.rand(2, 5, *grid), maps, layers=layers)
        assert says(error, "2 x 3" if layers else "4 x 6", "choose layers=" + ("those" if layers else "[1]"))
    assert propagate_cam(torch.rand(2, 5, *GRID), maps, layers=[1]).shape == (2, 5, *GRID)


class FewerQueries(Attention):
    """LeViT's step between stages: every other row and column asks, all answer, and these are the tokens left."""

    def forward(self, x: Tensor) -> Tensor:
        asking = x.unflatten(1, GRID)[:, ::2, ::2].flatten(1, 2)
        return asking + self.join(self.attend(self.split(asking)[0], *self.split(x)[1:]))


def test_reduced_queries_have_a_grid_of_their_own() -> None:
    maps, skipped = captured(Tokens(Attention(), FewerQueries(), Attention()), images())
    assert skipped == {}
    assert kinds(maps) == ["global", "reduced queries", "global"]
    assert [grids(layer) for layer in maps] == [(GRID, GRID), ((2, 3), GRID), ((2, 3), (2, 3))]
    assert maps[1].layout.query.stride == (16.0, 16.0)
    assert affinity_loss()(maps, maps) > 0


class PoolingOfFour(Attention):
    """Four queries of its own look at all tokens; what they find goes to every token alike."""

    def __init__(self, queries: int = 4) -> None:
        super().__init__()
        self.asking = nn.Parameter(torch.randn(1, queries, 32))

    def forward(self, x: Tensor) -> Tensor:
        asking = self.split(self.asking.expand(len(x), -1, -1))[0]
        return x + self.join(self.attend(asking, *self.split(x)[1:])).mean(1, keepdim=True)


def test_queries_that_are_not_the_modules_tokens_are_no_grid() -> None:
    maps, skipped = captured(Tokens(Attention(), PoolingOfFour(6)), images())
    assert kinds(maps) == ["global"]
    assert "the 6 queries to 24 keys are not the module's tokens" in skipped["blocks.1"]


class MoreKeys(ReducedKeys):
    """Keys pooled to a grid of a size of its own, which may be finer than that of the queries (PVTv2 linear)."""

    def others(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, GRID), (8, 12)).flatten(2).transpose(1, 2)


def test_more_keys_than_queries_lie_on_the_finer_grid() -> None:
    (layer,) = maps = captured(Tokens(MoreKeys()), images())[0]
    assert layer.shape == (2, 4, 24, 96)
    assert grids(layer) == (GRID, (8, 12))
    assert layer.layout.key.stride == (4.0, 4.0)
    assert affinity_loss()(maps, maps) > 0


def test_keys_that_fit_no_grid_like_that_of_the_queries_are_other_tokens() -> None:
    class Others(ReducedKeys):
        def others(self, x: Tensor) -> Tensor:
            return x[:, :7]

    maps, skipped = captured(Tokens(Attention(), Others()), images())
    assert kinds(maps) == ["global"]
    assert "24 queries and 7 keys fit no two grids of the image" in skipped["blocks.1"]


class PooledAlongTheSequence(ReducedKeys):
    """NextViT's keys: means of runs of tokens in row-major order, which wrap around the ends of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(4, 4)

    def others(self, x: Tensor) -> Tensor:
        return self.pool(x.transpose(1, 2)).transpose(1, 2)


def test_keys_pooled_along_the_sequence_are_captured_and_their_layout_refused() -> None:
    """6 keys for a grid of 4 x 6 look just like those of a 2 x 2 reduction, and lie elsewhere."""
    maps, skipped = captured(Tokens(PooledAlongTheSequence(), Attention()), images())
    assert skipped == {}
    assert maps[0].shape == (2, 4, 24, 6)
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0)", "6 keys pooled along the sequence of 24", "layers=")
    assert affinity_loss(layers=[1])(maps, maps) > 0


class Unroll(nn.Module):
    """Hiera's order of tokens: those of one mask unit follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        units = x.unflatten(1, GRID).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return units.transpose(2, 3).flatten(1, 4)


def test_tokens_in_the_order_of_mask_units_are_captured_and_their_layout_refused() -> None:
    model = Tokens(Unroll(), Attention(), ReducedKeys())
    maps, skipped = captured(model, images())
    assert skipped == {}
    assert kinds(maps) == ["global", "reduced keys"]
    for layers in ([0], [1]):
        error = refusal_of_the_loss(maps, layers=layers)
        assert says(error, "order of mask units (Unroll)", "row by row", "from_tensors")
    in_order = AttentionMaps.from_tensors(maps.weights()[:1], num_prefix_tokens=0, grid=GRID)
    assert affinity_loss()(in_order, in_order) > 0


# ---- attention between channels


class ChannelAttention(Attention):
    """XCiT: channels look at channels over all tokens; by hand, or a kernel given transposed operands."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(*(t.transpose(-2, -1) for t in (F.normalize(q, dim=-2), F.normalize(k, dim=-2), v))).mT


class GroupedChannels(Attention):
    """DaViT: the map of channels (q^T k) meets the transposed values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.transpose(-1, -2) @ k * q.shape[-2] ** -0.5).softmax(dim=-1)
        return (weights @ v.transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.parametrize("build", [ChannelAttention, GroupedChannels, lambda: ChannelAttention(fused=True)])
@pytest.mark.parametrize("square", [False, True], ids=["fewer channels than tokens", "as many"])
def test_channel_attention_is_skipped_by_name(build: Callable[[], nn.Module], square: bool) -> None:
    """Also with 8 channels a head and 4 x 2 tokens, where only the values' order in memory tells."""
    x = images(size=(32, 16) if square else SIZE)
    maps, skipped = captured(Tokens(Attention(), build()), x)
    assert [layer.name for layer in maps] == ["blocks.0"]
    assert skipped["blocks.1"] == "channel attention: 8 channels attend to 8 channels over all tokens"
    error = nothing_captured(Tokens(build()), x)
    assert "blocks.0: channel attention: 8 channels attend to 8 channels over all tokens" in str(error.value)


class ByConvolution(nn.Module):
    """Attention over maps (B, C, h, w), projected by 1x1 convolutions; ``order`` is that of its last product."""

    def __init__(self, heads: int = 4, order: str = "A V") -> None:
        super().__init__()
        self.num_heads, self.order = heads, order
        self.qkv, self.proj = nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B, H, d, N)
        if self.order == "fused":
            y = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        else:
            weights = (q.transpose(-2, -1) @ k * q.shape[-2] ** -0.5).softmax(-1)
            y = v @ weights.transpose(-2, -1) if self.order == "V^T A^T" else (weights @ v.mT).mT
        return x + self.proj(y.flatten(1, 2).unflatten(2, size))


class Maps(Tokens):
    """The same patches, kept as maps (B, C, h, w)."""

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("size", [(32, 16), (64, 32), SIZE], ids=["N = d", "N = C", "N > d"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Tokens(Attention()),
        lambda: Tokens(Attention(fused=True)),
        lambda: Tokens(Attention(heads=1)),
        lambda: Tokens(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)),
        lambda: Maps(ByConvolution()),
        lambda: Maps(ByConvolution(order="V^T A^T")),
        lambda: Maps(ByConvolution(order="fused")),
        lambda: Maps(ByConvolution(heads=1, order="V^T A^T")),
    ],
    ids=[
        "by hand",
        "fused",
        "one head",
        "nn.MultiheadAttention",
        "maps",
        "maps V^T A^T",
        "maps fused",
        "maps one head",
    ],
)
def test_as_many_tokens_as_a_head_is_wide_are_not_channels(
    build: Callable[[], nn.Module], size: tuple[int, int]
) -> None:
    (layer,) = captured(build(), images(size=size))[0]
    grid = (size[0] // 8, size[1] // 8)
    assert layer.kind == "global"
    assert layer.shape[2:] == (grid[0] * grid[1],) * 2
    assert grids(layer) == (grid, grid)


# ---- attention to other tokens, and to few


class ClassAttention(Attention):
    """One query, of the mean token here, looks at all."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(x.mean(1, keepdim=True))[0]
        return x + self.join(self.attend(q, *self.split(x)[1:]))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
def test_class_attention_with_one_query_is_skipped_by_name(fused: bool) -> None:
    maps, skipped = captured(Tokens(Attention(), ClassAttention(fused=fused)), images())
    assert [layer.name for layer in maps] == ["blocks.0"]
    assert skipped["blocks.1"] == "pooling or class attention: 1 query attends to 24 keys"


class Looking(Attention):
    """Attention to tokens that the caller gives, under any name, or to its own."""

    def forward(self, x: Tensor, second: Tensor | None = None, **named: Tensor | None) -> Tensor:
        other = next((t for t in (*named.values(), second) if t is not None and t.is_floating_point()), x)
        if other.ndim == 2:  # positions (N, C), or a condition (B, C)
            x = other = x + (other if len(other) == x.shape[1] else other[:, None])
        return x + self.join(self.attend(self.split(x)[0], *self.split(other)[1:]))


class Decoder(nn.Module):
    """Attention of its own, then a second one that ``call`` makes with its tokens and others (B, M, C)."""

    def __init__(self, call: Callable[[nn.Module, Tensor, Tensor], Tensor], count: int = 24) -> None:
        super().__init__()
        self.own, self.second = Attention(), Looking()
        self.others = nn.Parameter(torch.randn(1, count, 32))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.second, self.own(x), self.others.expand(len(x), -1, -1))


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda m, x, y: m(x, key_value_states=y), 24),
        (lambda m, x, y: m(x, encoder_hidden_states=y), 24),
        (lambda m, x, y: m(x, key=y), 24),
        (lambda m, x, y: m(x, k=y), 24),
        (lambda m, x, y: m(x, kv=y), 24),
        (lambda m, x, y: m(x, memory=y), 24),
        (lambda m, x, y: m(x, context=y), 24),
        (lambda m, x, y: m(x, context=y), 6),  # as many as reduced keys would be
        (lambda m, x, y: m(key=y, x=x), 24),  # in whichever order they are written
        (lambda m, x, y: m(context=y, x=x), 6),
        (lambda m, x, y: m(x, y), 6),  # by their number alone
        (lambda m, x, y: m(x, y), 23),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_cross_attention_is_told_by_names_or_by_two_tensors(call, count: int) -> None:
    maps, skipped = captured(Tokens(Decoder(call, count)), images())
    assert [layer.name for layer in maps] == ["blocks.0.own"]
    assert skipped["blocks.0.second"] == f"cross-attention: 24 queries attend to {count} keys of other tokens"


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: m(x, key=x),
        lambda m, x, y: m(key=x, x=x),
        lambda m, x, y: m(x, key_value_states=None),
        lambda m, x, y: m(x, x),
        lambda m, x, y: m(x, y[0]),  # positions (N, C)
        lambda m, x, y: m(x, y[:, 0]),  # a condition of each image (B, C)
        lambda m, x, y: m(x, torch.zeros(2, 7, 2, dtype=torch.int64)),  # indices
        lambda m, x, y: m(x, torch.ones(2, 1, 24, dtype=torch.bool)),  # a mask
    ],
    ids=["key=x", "key=x first", "None", "twice", "positions", "condition", "indices", "mask"],
)
def test_self_attention_that_is_given_more_than_its_tokens(call) -> None:
    maps, skipped = captured(Tokens(Decoder(call)), images())
    assert [layer.name for layer in maps] == ["blocks.0.own", "blocks.0.second"]
    assert skipped == {}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "in order"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_multihead_attention_whose_queries_are_not_its_keys(weights: bool, named: bool, batch_first: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("own", "positions", "cross"):
                setattr(self, name, nn.MultiheadAttention(32, 4, batch_first=batch_first))

        @staticmethod
        def call(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if named:
                return attention(query=q, key=k, value=v, need_weights=weights)[0]
            return attention(q, k, v, need_weights=weights)[0]

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            x = self.call(self.own, x, x, x)
            placed = x + torch.linspace(0, 1, 32)
            x = self.call(self.positions, placed, placed, x)  # DETR: values without positions are the same tokens
            others = x + 1
            x = self.call(self.cross, x, others, others)
            return x if batch_first else x.transpose(0, 1)

    maps, skipped = captured(Tokens(Block()), images())
    assert [layer.name for layer in maps] == ["blocks.0.own", "blocks.0.positions"]
    assert kinds(maps) == ["global", "global"]
    assert "cross-attention" in skipped["blocks.0.cross"]


def test_a_batch_that_is_no_multiple_of_the_images_is_of_something_else() -> None:
    class Merged(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x.mean(0, keepdim=True))

    maps, skipped = captured(Tokens(Attention(), Merged()), images())
    assert [layer.name for layer in maps] == ["blocks.0"]
    assert skipped["blocks.1"] == "not the tokens of the images: a batch of 1 for 2 images"


# ---- softmaxes that make no attention of tokens


class LinearAttention(Attention):
    """Efficient attention: keys are softmaxed over the tokens and meet the values first. No map is ever there."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class LinearOverTheLastAxis(Attention):
    """The same with keys (..., d, N), softmaxed over their last axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1).softmax(-1) @ v)


class Gate(Attention):
    """A softmax over what a linear map scores, which weighs tokens of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x.flip(1)], -2)
        return (self.score(x).softmax(-1).unsqueeze(-2) @ both).squeeze(-2)


class OverTheQueries(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v


class OverTheHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.transpose(-2, -1), 1) @ v


class WithoutValues(Attention):
    """Its map serves as a score and meets no values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v * torch.softmax(q @ k.transpose(-2, -1), -1).amax(-1, keepdim=True)


class SumsTheQueries(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v


class BetweenImages(Attention):
    """Scores between the images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1)
        return x + ((mean @ mean.T).softmax(-1) @ mean)[:, None]


NO_MAP = [
    (LinearAttention, "linear attention or a gate: a softmax over (2, 4, 24, 8) of no product of queries and keys"),
    (LinearOverTheLastAxis, "linear attention or a gate: a softmax over (2, 4, 8, 24) of no product of queries"),
    (Gate, "linear attention or a gate: a softmax over (2, 24, 2) of no product of queries and keys"),
    (OverTheQueries, "no attention over keys: a softmax over axis -2 of (2, 4, 24, 24), not the last"),
    (OverTheHeads, "no attention over keys: a softmax over axis 1 of (2, 4, 24, 24), not the last"),
    (WithoutValues, "a softmax over (2, 4, 24, 24) that met no values"),
    (SumsTheQueries, "no attention of queries to keys: the product with the values sums over the queries"),
    (BetweenImages, "attention between images, not their tokens: a softmax over (2, 2)"),
]


@pytest.mark.parametrize(("build", "reason"), NO_MAP, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_no_attention_of_tokens_is_told_by_name_and_reason(build: type[nn.Module], reason: str) -> None:
    maps, skipped = captured(Tokens(Attention(), build(), Attention()), images())
    assert [layer.name for layer in maps] == ["blocks.0", "blocks.2"]
    assert any(reason in found for found in skipped.values()), skipped
    assert reason in str(nothing_captured(Tokens(build()), images()).value)


# ---- every way to write the two products


class Transposed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1)
        return (v.transpose(-2, -1) @ self.seen.transpose(-2, -1)).transpose(-2, -1)


class Einsum(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", self.seen, v)


class EinsumTokensFirst(Attention):
    """(B, N, H, d) throughout, as in BERT-like code: the values' axes stand in another order than the map's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.seen = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", self.seen, v).transpose(1, 2)


class EinsumValuesFirst(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("bhid,bhjd->bhij", [q, k]).softmax(-1)
        return torch.einsum("bhjd,bhij->bhid", [v, self.seen])


class EinsumEllipsis(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
        return torch.einsum("...ij,...jd->...id", self.seen, v)


class EinsumLists(Attention):
    """With lists of numbers in place of letters, and tokens first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.seen = torch.einsum(q, [0, 2, 1, 3], k, [0, 4, 1, 3], [0, 1, 2, 4]).softmax(-1)
        return torch.einsum(self.seen, [0, 1, 2, 4], v, [0, 4, 1, 3], [0, 2, 1, 3]).transpose(1, 2)


class Baddbmm(Attention):
    """Scores onto a bias, heads flattened into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.linspace(-1, 1, 24).expand(1, 24, 24)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        self.seen = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.3), dim=-1)
        return torch.bmm(self.seen, v).unflatten(0, (-1, self.num_heads))


class Operators(Attention):
    """With an additive mask, the softmax in double precision and given by function, and casts on the way back."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -1e4)
        self.seen = F.softmax(scores, dim=3, dtype=torch.float64)
        return torch.matmul(self.seen.to(v.dtype).contiguous(), v)


class Reshaped(Attention):
    """The map is computed as (B H, N, M) and meets the values as (B, H, N, M), whose shape then is the one told."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1)
        self.seen = flat.view(-1, self.num_heads, *flat.shape[1:])
        return self.seen @ v


class Flattened(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1).reshape(-1, 24, 24)
        return torch.bmm(self.seen, v.flatten(0, 1)).unflatten(0, (-1, self.num_heads))


class OneHeadWithoutItsAxis(Attention):
    """(B, N, N) at (B, N, C): no axis of heads, of which there is one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.seen = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(-1)
        return x + self.proj(self.seen @ v)


WRITTEN = [
    Transposed,
    Einsum,
    EinsumTokensFirst,
    EinsumValuesFirst,
    EinsumEllipsis,
    EinsumLists,
    Baddbmm,
    Operators,
    Reshaped,
    Flattened,
    OneHeadWithoutItsAxis,
]


@pytest.mark.parametrize("build", WRITTEN)
@pytest.mark.parametrize("checks", [True, False], ids=["for checks", "as users do"])
def test_however_the_products_are_written_the_map_is_the_one_that_met_the_values(
    build: type[Attention], checks: bool
) -> None:
    model = Tokens(build())
    (layer,) = maps = captured(model, images(), checks)[0]
    heads = 1 if build is OneHeadWithoutItsAxis else 4
    assert layer.kind == "global"
    assert layer.shape == (2, heads, 24, 24)
    assert layer.stochastic
    assert grids(layer) == (GRID, GRID)
    seen = model.blocks[0].seen
    assert torch.equal(layer.weights().flatten(), seen.flatten())
    with capture_attention(model) as attention:  # and the logits depend on it
        logits = model(images())
        (gradient,) = torch.autograd.grad(logits.sum(), attention.take()[0].recorded.map)
    assert gradient.abs().max() > 0
    assert affinity_loss(distance="js")(maps, maps) > 0


# ---- maps that are mixed after the softmax


class TalkingHeads(Attention):
    """CaiT: heads are mixed before and after the softmax."""

    def __init__(self, by: str = "linear") -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.convolution = nn.Conv2d(4, 4, 1)
        self.by = by

    def mix(self, weights: Tensor) -> Tensor:
        if self.by == "convolution":  # EfficientFormerV2
            return self.convolution(weights)
        if self.by == "einsum":  # DeepViT
            return torch.einsum("b h i j, g h -> b g i j", weights, self.after.weight)
        if self.by == "matmul":
            return (weights.permute(0, 2, 3, 1) @ self.after.weight).permute(0, 3, 1, 2)
        return self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        self.seen = self.mix(scores.softmax(-1))
        return self.seen @ v


class Gated(Attention):
    """ConViT: a softmax over content and one over positions, mixed by a gate and brought back to a sum of 1."""

    def __init__(self, content_first: bool = True) -> None:
        super().__init__()
        self.positions, self.gate = nn.Linear(3, 4), nn.Parameter(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        self.content_first = content_first

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, 24 * 24 * 3).view(1, 24, 24, 3).expand(len(q), -1, -1, -1)
        position = self.positions(places).permute(0, 3, 1, 2)
        content = q @ k.transpose(-2, -1)
        gate = self.gate.view(1, -1, 1, 1).sigmoid()
        if self.content_first:
            self.seen = (1.0 - gate) * content.softmax(-1) + gate * position.softmax(-1)
        else:
            self.seen = gate * position.softmax(-1) + (1.0 - gate) * content.softmax(-1)
        self.seen /= self.seen.sum(-1).unsqueeze(-1)
        return self.seen @ v


class Masked(Attention):
    """Keys are left out after the softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen = (q @ k.transpose(-2, -1)).softmax(-1) * torch.arange(24).gt(3)
        return self.seen @ v


class Subtracted(Attention):
    """Differential attention after one softmax: of two maps, one is taken from the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (q @ k.transpose(-2, -1)).softmax(-1)
        self.seen = maps[:, :2] - 0.3 * maps[:, 2:]
        return torch.cat([self.seen @ v[:, :2], self.seen @ v[:, 2:]], 1)


MIXED = {
    "talking heads": TalkingHeads,
    "talking heads by convolution": lambda: TalkingHeads("convolution"),
    "gate": Gated,
    "gate, positions first": lambda: Gated(False),
    "masked": Masked,
    "subtracted": Subtracted,
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_maps_are_the_operand_that_meets_the_values_and_no_probabilities(name: str) -> None:
    model, x = Tokens(Attention(), MIXED[name]()), images()
    maps, skipped = captured(model, x)
    assert skipped == {}
    assert [layer.name for layer in maps] == ["blocks.0", "blocks.1"]  # one layer each, whatever the softmaxes
    assert [layer.stochastic for layer in maps] == [True, False]
    assert kinds(maps) == ["global", "global"]
    assert torch.equal(maps[1].weights(), model.blocks[1].seen)
    with capture_attention(model) as attention:
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits.sum(), attention.take()[1].recorded.map)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", MIXED)
def test_js_is_refused_for_mixed_maps(name: str) -> None:
    maps, _ = captured(Tokens(Attention(), MIXED[name]()), images())
    with pytest.raises(ValueError, match="mixed after softmax") as error:
        affinity_loss(distance="js")(maps, maps)
    assert says(error, "layer 1 (blocks.1)", 'distance="l1"')
    for distance in ("l1", "l2"):
        loss, terms = affinity_loss(distance=distance)(maps, maps, return_terms=True)
        assert loss > 0
        assert terms["entropy"].isnan()
    assert affinity_loss(distance="js", layers=[0])(maps, maps) > 0


@pytest.mark.parametrize("by", ["einsum", "matmul"])
def test_heads_mixed_by_a_product_are_one_mixed_layer(by: str) -> None:
    """DeepViT mixes heads by an einsum: the product with the mixing matrix is none with values."""
    model = Tokens(TalkingHeads(by))
    (layer,) = captured(model, images(), checks=False)[0]
    assert layer.kind == "global"
    assert layer.shape == (2, 4, 24, 24)
    assert not layer.stochastic
    assert torch.equal(layer.weights(), model.blocks[0].seen)


# ---- dropout


class DroppedInPlace(Attention):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        self.seen = F.dropout(weights, 0.5, self.training, self.inplace)
        return self.seen @ v


def test_dropout_in_place_leaves_no_probabilities_and_says_so() -> None:
    """What the softmax gave is overwritten: the map is what met the values, zeros and all."""
    model = Tokens(DroppedInPlace()).train()
    with capture_attention(model) as attention:
        for _ in range(2):
            logits = model(images())
            (layer,) = maps = attention.take()
            assert layer.dropout == 0.5
            assert not layer.stochastic
            assert torch.equal(layer.weights(), model.blocks[0].seen)
            assert (layer.weights() == 0).float().mean() > 0.3
        (gradient,) = torch.autograd.grad(logits.sum(), layer.recorded.map)
        assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="mixed after softmax"):
        affinity_loss(distance="js")(maps, maps)


@pytest.mark.parametrize(("inplace", "training"), [(True, False), (False, True), (False, False)])
def test_dropout_that_overwrites_nothing_leaves_probabilities(inplace: bool, training: bool) -> None:
    model = Tokens(DroppedInPlace(inplace)).train(training)
    (layer,) = maps = captured(model, images())[0]
    assert layer.stochastic
    assert layer.dropout == (0.5 if training else 0.0)
    assert (layer.weights().sum(-1) - 1).abs().max() < 1e-5
    assert affinity_loss(distance="js")(maps, maps) > 0


# ---- several kernels in a module, and modules with other kernels


class Differential(Attention):
    """Two kernels in one module, the output of one taken from that of the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (
            F.scaled_dot_product_attention(q[..., part], k[..., part], v) for part in (slice(4), slice(4, 8))
        )
        return first - 0.3 * second


def test_two_kernels_in_one_module_are_two_layers_of_one_run() -> None:
    model = Tokens(Differential(), Attention(), Differential())
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            model(images())
            (maps,) = attention.take_all()
            assert [layer.name for layer in maps] == [f"blocks.{i}" for i in (0, 0, 1, 2, 2)]
            assert maps.layers == (0, 1, 2, 3, 4)
            assert not torch.equal(maps[0].weights(), maps[1].weights())
            assert all(layer.stochastic for layer in maps)
        model(images(1)), model(images(3))
        assert [maps.batch_size for maps in attention.take_all()] == [1, 3]
    assert affinity_loss()(maps, maps) > 0


class ByKernel(Attention):
    """One class whose instances run another kernel when told so: none that a function mode tells apart."""

    def __init__(self, kernel: str = "by hand") -> None:
        super().__init__()
        self.kernel = kernel

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernel == "by hand":
            return super().attend(q, k, v)
        if self.kernel == "aten":
            return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]
        weights = (q @ k.transpose(-2, -1)).exp()  # a softmax written out
        return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("kernel", ["written out", "aten"])
def test_modules_of_the_same_class_that_run_another_kernel_are_named(kernel: str) -> None:
    model = Tokens(ByKernel(), ByKernel(kernel), ByKernel(), ByKernel(kernel))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match="none that can be captured") as error:
                attention.take()
            assert says(error, "Attention was seen in 2 modules", "blocks.1", "blocks.3", "modules=")
            assert "blocks.0" not in str(error.value)
    with capture_attention(model, modules=["blocks.0", "blocks.2"]) as attention:
        model(images())
        assert [layer.name for layer in attention.take()] == ["blocks.0", "blocks.2"]


def test_a_kernel_under_another_class_in_the_same_place_of_another_block_is_named() -> None:
    class FlashAttention(ByKernel):
        pass

    def block(attention: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attn": attention})

    class Blocks(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for each in self.blocks:
                x = each["attn"](x)
            return self.head(x.mean(1))

    model = Blocks(block(Attention()), block(FlashAttention("written out")))
    with capture_attention(model) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(CaptureError, match=r"blocks\.1\.attn"):
                attention.take()


class Pooling(nn.Module):
    """PoolFormer's token mixer: a mean over neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.transpose(1, 2).unflatten(2, GRID), 3, 1, 1).flatten(2).transpose(1, 2) - x


class Mixing(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.token_mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.token_mixer(x)


def test_pooling_beside_attention_is_no_missing_attention() -> None:
    maps, skipped = captured(Tokens(Mixing(Pooling()), Mixing(Attention()), Mixing(Pooling())), images())
    assert [layer.name for layer in maps] == ["blocks.1.token_mixer"]
    assert skipped == {}
    assert affinity_loss()(maps, maps) > 0


# ---- which tensor is the images


def narrow_stem() -> list[nn.Module]:
    """Three convolutions, of which the second reads 4 channels and the third 2."""
    channels = (3, 4, 2, 32)
    return [nn.Conv2d(channels[i], channels[i + 1], 3, 2, 1) for i in range(3)]


class OnMaps(Attention):
    """Attention given maps (B, h, w, C), of which a few rows look like an image of as many channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class Cbam(nn.Module):
    """A gate by a convolution over two maps, the mean and the maximum of (B, h, w, C) over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x.mean(-1), x.amax(-1)], 1)
        return x * self.gate(both).sigmoid().movedim(1, -1)


class OfThreeHeads(OnMaps):
    """Its queries (B, 3, N, d), which a module of their own is given, are as large as a small image."""

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    def __init__(self) -> None:
        super().__init__(width=36, heads=3)
        self.core, self.widen, self.narrow = self.Core(), nn.Linear(32, 36), nn.Linear(36, 32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(super().forward(self.widen(x)))


class Rows(nn.Module):
    """A stem and blocks over (B, h, w, C), called one by one, also by ``forward_features`` from outside."""

    def __init__(self, stem: Sequence[nn.Module], *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.ModuleList(stem), nn.ModuleList(blocks), nn.Linear(32, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        for convolution in self.stem:
            x = convolution(x)
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((1, 2)))


NOT_IMAGES = {
    "a narrow stem": (lambda: Rows(narrow_stem(), OnMaps(), OnMaps()), (64, 96)),
    "a spatial gate": (lambda: Rows([nn.Conv2d(3, 32, 8, 8)], Cbam(), OnMaps(), Cbam(), OnMaps()), (64, 96)),
    "three heads": (lambda: Rows([nn.Conv2d(3, 32, 8, 8)], OfThreeHeads(), OfThreeHeads()), (32, 48)),
    "4 rows": (lambda: Rows([nn.Conv2d(3, 32, 8, 8)], OnMaps(), OnMaps()), (32, 32)),
    "3 rows": (lambda: Rows([nn.Conv2d(3, 32, 8, 8)], OnMaps(), OnMaps()), (24, 40)),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
@pytest.mark.parametrize("entries", ["forward, forward", "forward, features", "features, features"])
def test_what_is_no_image_is_not_taken_for_one(name: str, entries: str) -> None:
    """In the first run, where every module is watched, and in the second, where those of attention are."""
    build, size = NOT_IMAGES[name]
    model, x = build(), images(size=size)
    grid = (size[0] // 8, size[1] // 8)
    with capture_attention(model) as attention:
        for entry in entries.split(", "):
            model(x) if entry == "forward" else model.forward_features(x)
            maps = attention.take()
            assert len(maps) == 2
            for layer in maps:
                assert layer.layout.query.extent == size
                assert grids(layer) == (grid, grid)
                assert layer.layout.query.stride == (8.0, 8.0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_one_three_or_four_channels_are_images(channels: int) -> None:
    model = Rows([nn.Conv2d(channels, 32, 8, 8)], OnMaps())
    with capture_attention(model) as attention:
        for _ in range(2):
            model(torch.randn(2, channels, *SIZE))
            assert attention.take()[0].layout.query.extent == SIZE


def test_images_resized_by_the_model_tell_the_grid() -> None:
    class Resizing(Tokens):
        def embed(self, x: Tensor) -> Tensor:
            return super().embed(F.interpolate(x, scale_factor=0.5))

    (layer,) = captured(Resizing(Attention()), images(size=(64, 96)))[0]
    assert grids(layer) == (GRID, GRID)


# ---- models as they are out there


def timm_model(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **kwargs)

    return build


def transformers_model(name: str, attn: str = "eager", **config: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        return model_class._from_config(model_class.config_class(**config), attn_implementation=attn)

    return build


def transformers_swin(attn: str) -> Callable[[], nn.Module]:
    sizes = {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]}
    return transformers_model(
        "SwinForImageClassification", attn, image_size=64, patch_size=4, window_size=4, num_labels=5, **sizes
    )


def segformer() -> nn.Module:
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2]}
    return transformers_model("SegformerForImageClassification", num_labels=5, **sizes)()


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2, 2), "num_heads": (2, 4, 8)}
TINY = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
DAVIT = {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)}
MODELS = {
    "timm swin": (
        timm_model("swin_tiny_patch4_window7_224", **SWIN),
        (64, 64),
        ["16 windows of 4 x 4", "4 windows of 4 x 4", "4 windows of 4 x 4, shifted by 2 x 2", "4 x 4", "4 x 4"],
        {},
    ),
    "timm twins": (
        timm_model("twins_svt_small", img_size=64, depths=(2, 2, 1, 1)),
        (64, 64),
        [
            "9 windows of 7 x 7",
            "16 x 16, keys 2 x 2",
            "4 windows of 7 x 7",
            "8 x 8, keys 2 x 2",
            "1 windows of 7 x 7",
            "1 windows of 7 x 7",
        ],
        {},
    ),
    "timm davit": (
        timm_model("davit_tiny", **DAVIT),
        (64, 64),
        ["9 windows of 7 x 7", "4 windows of 7 x 7", "1 windows of 7 x 7", "1 windows of 7 x 7"],
        {f"stages.{i}.blocks.0.1.attn": "32 channels attend to 32 channels" for i in range(4)},
    ),
    "timm cait": (
        timm_model("cait_xxs24_224", **TINY),
        (64, 64),
        ["4 x 4, mixed", "4 x 4, mixed"],
        {f"blocks_token_only.{i}.attn": "pooling or class attention: 1 query attends to 17 keys" for i in range(2)},
    ),
    "timm convit": (
        timm_model("convit_tiny", img_size=64, depth=3, local_up_to_layer=2),
        (64, 64),
        ["4 x 4, mixed", "4 x 4, mixed", "1 prefix + 4 x 4"],
        {},
    ),
    "timm differential": (
        timm_model("vit_dlittle_patch16_reg1_gap_256", **TINY),
        (64, 64),
        ["1 prefix + 4 x 4"] * 4,
        {},
    ),
    "timm levit": (
        timm_model("levit_128s"),
        (224, 224),
        ["14 x 14"] * 2 + ["7 x 7, keys 14 x 14"] + ["7 x 7"] * 3 + ["4 x 4, keys 7 x 7"] + ["4 x 4"] * 4,
        {},
    ),
    "timm pvt, linear": (
        timm_model("pvt_v2_b2_li", depths=(1, 1, 1, 1)),
        (64, 64),
        ["16 x 16, keys 7 x 7", "8 x 8, keys 7 x 7", "4 x 4, keys 7 x 7", "2 x 2, keys 7 x 7"],
        {},
    ),
    "timm nextvit": (
        timm_model("nextvit_small", depths=(1, 1, 5, 1)),
        (64, 64),
        ["keys pooled along the sequence", "keys pooled along the sequence", "2 x 2"],
        {},
    ),
    "timm hiera": (
        timm_model("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1)),
        (64, 64),
        ["4 windows", "4 windows", "4 windows", "order of mask units (Unroll)"],
        {},
    ),
    "transformers swin, eager": (
        transformers_swin("eager"),
        (64, 64),
        ["16 windows of 4 x 4", "16 windows of 4 x 4, shifted by 2 x 2", "4 windows of 4 x 4"],
        {},
    ),
    "transformers swin, sdpa": (
        transformers_swin("sdpa"),
        (64, 64),
        ["16 windows of 4 x 4", "16 windows of 4 x 4, shifted by 2 x 2", "4 windows of 4 x 4"],
        {},
    ),
    "transformers segformer": (
        segformer,
        (64, 96),
        ["16 x 24, keys 2 x 3", "8 x 12, keys 2 x 3", "4 x 6, keys 2 x 3", "2 x 3"],
        {},
    ),
}


def summary(layer) -> str:
    """What was told of a layer's tokens, in words."""
    if layer.window is not None:
        return str(layer.window)
    if layer.placed is None:
        return layer.why_unplaced
    query, key = grids(layer)
    prefix = f"{layer.layout.num_prefix_tokens} prefix + " * (layer.layout.num_prefix_tokens > 0)
    keys = f", keys {layer.layout.key}" * (key != query)
    return f"{prefix}{layer.layout.query}{keys}{'' if layer.stochastic else ', mixed'}"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_told_of_models_out_there(name: str) -> None:
    build, size, told, reasons = MODELS[name]
    maps, skipped = captured(build().eval(), images(size=size))
    assert len(maps) == len(told)
    for layer, expected in zip(maps, told, strict=True):
        found = summary(layer)
        assert found.startswith(expected) if layer.window or layer.placed is not None else expected in found
    assert skipped.keys() == reasons.keys()
    for module, reason in reasons.items():
        assert reason in skipped[module]


def test_a_model_of_channel_attention_alone_is_refused_by_name() -> None:
    build = timm_model("xcit_nano_12_p16_224", img_size=64, depth=2)
    for size in ((64, 64), (64, 128)):  # 16 tokens, and 32, as many as a head has channels
        message = str(nothing_captured(build(), images(size=size)).value)
        assert "blocks.1.attn: channel attention: 32 channels attend to 32 channels over all tokens" in message
        assert "cls_attn_blocks.0.attn: pooling or class attention: 1 query" in message


def test_the_last_stage_of_swin_is_regularised_and_gives_class_maps() -> None:
    model, view, x = timm_model("swin_tiny_patch4_window7_224", **SWIN)().eval(), HorizontalFlip(), images(2, (64, 64))
    with capture_attention(model) as attention:
        logits = model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    with pytest.raises(LayoutError) as error:
        affinity_loss(view)(a, b)
    assert says(error, "layer 0 (layers.0.blocks.0.attn)", "Choose layers=[3, 4]")
    assert affinity_loss(view, layers=[3, 4])(a, b) > 0
    last = a.select([3, 4])
    cam = class_token_gradient_cam(logits, last, query="all")
    assert cam.shape == (2, 5, 4, 4)
    assert propagate_cam(cam, last).shape == (2, 5, 4, 4)
    affinity_loss(view, layers=[3, 4])(a, b).backward()
    assert model.layers[0].blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_segformer_is_regularised_on_both_of_its_grids() -> None:
    model, view, x = segformer().eval(), HorizontalFlip(), images(size=(64, 96))
    with capture_attention(model) as attention:
        model(x)
        a = attention.take()
        model(view(x))
        b = attention.take()
    assert [layer.layout.query.stride[0] for layer in a] == [4, 8, 16, 32]
    assert [layer.layout.key.stride[0] for layer in a] == [32, 32, 32, 32]
    affinity_loss(view)(a, b).backward()
    for stage in model.segformer.stages:
        gradients = [p.grad for name, p in stage.named_parameters() if name.endswith(("q_proj.weight", "query.weight"))]
        assert gradients
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_patches_dropped_in_training_leave_no_grid() -> None:
    """4 of 16 tokens would make a 2 x 2 grid of a later stage, in a model that has none."""
    model = timm_model("vit_tiny_patch16_224", **TINY, patch_drop_rate=0.75)()
    with capture_attention(model) as attention:
        model.train()(images(size=(64, 64)))
        (first, _) = maps = attention.take()
        assert first.shape[2:] == (5, 5)
        assert says(refusal_of_the_loss(maps), "5 tokens for an image of 64 x 64 px", "a grid of 4 x 4")
        model.eval()(images(size=(64, 64)))
        maps = attention.take()
        assert grids(maps[0]) == ((4, 4), (4, 4))
        assert affinity_loss()(maps, maps) > 0
