"""Attention within windows: told from the batch or a fifth axis, and refused by name where a grid is needed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from acr_reg import HorizontalFlip, LayoutError, capture_attention, class_token_gradient_cam, propagate_cam
from tests.support.attention import says
from tests.support.capturing import affinity_loss, captured, grids, images, kinds, refusal_of_the_loss
from tests.support.models.reduced import Unroll
from tests.support.models.tokens import GRID, Attention, Tokens
from tests.support.models.windows import Windows, only_windows, windows_and_global


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


# ---- refusals


def test_the_loss_refuses_windows_by_name_and_lists_the_layers_to_use() -> None:
    maps, _ = captured(windows_and_global(), images())
    assert kinds(maps) == ["window", "global", "window", "global"]
    error = refusal_of_the_loss(maps)
    assert says(error, "layer 0 (blocks.0.attn)", "4 windows of 2 x 3 (6 tokens each)", "Use only layers [1, 3]")
    error = refusal_of_the_loss(maps, layers=[1, 2])
    assert says(error, "layer 2 (blocks.2.attn)", "shifted by 1 x 1", "Use only layers [1, 3]")


def test_where_every_layer_is_of_windows_the_message_does_not_send_in_circles() -> None:
    maps, _ = captured(only_windows(), images())
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0.attn)", "4 windows of 2 x 3", "No captured layer does")


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
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0.attn)", "No captured layer does")


@pytest.mark.parametrize("query", ["class", "all"])
@pytest.mark.parametrize("build", [windows_and_global, only_windows])
def test_a_gradient_class_map_refuses_windows_by_name(build: Callable[[], nn.Module], query: str) -> None:
    model = build()
    with capture_attention(model) as attention:
        logits = model(images())
        maps = attention.take()
        with pytest.raises(LayoutError) as error:
            class_token_gradient_cam(logits, maps, start_layer=0, query=query)
        advice = "Use only layers [1, 3]" if build is windows_and_global else "No captured layer does"
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
