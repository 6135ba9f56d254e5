"""Keys or queries on another grid than the tokens, and tokens that lie on none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from acr_reg import (
    AttentionMaps,
    HorizontalFlip,
    VerticalFlip,
    align_attention,
    capture_attention,
    class_token_gradient_cam,
    propagate_cam,
)
from tests.support.attention import says
from tests.support.capturing import affinity_loss, captured, grids, images, kinds, refusal_of_the_loss
from tests.support.models.reduced import FewerQueries, MoreKeys, PooledAlongTheSequence, Pyramid, ReducedKeys, Unroll
from tests.support.models.tokens import GRID, SIZE, Attention, Tokens


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
        aligned = align_attention(other.weights(), view, other.layout, one.layout)
        assert (one.weights() - aligned).abs().max() < 1e-6
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
        assert says(error, "2 x 3" if layers else "4 x 6", "over layers " + ("of one stage" if layers else "[1]"))
    assert propagate_cam(torch.rand(2, 5, *GRID), maps, layers=[1]).shape == (2, 5, *GRID)


def test_reduced_queries_have_a_grid_of_their_own() -> None:
    maps, skipped = captured(Tokens(Attention(), FewerQueries(), Attention()), images())
    assert skipped == {}
    assert kinds(maps) == ["global", "reduced queries", "global"]
    assert [grids(layer) for layer in maps] == [(GRID, GRID), ((2, 3), GRID), ((2, 3), (2, 3))]
    assert maps[1].layout.query.stride == (16.0, 16.0)
    assert affinity_loss()(maps, maps) > 0


def test_more_keys_than_queries_lie_on_the_finer_grid() -> None:
    (layer,) = maps = captured(Tokens(MoreKeys()), images())[0]
    assert layer.shape == (2, 4, 24, 96)
    assert grids(layer) == (GRID, (8, 12))
    assert layer.layout.key.stride == (4.0, 4.0)
    assert affinity_loss()(maps, maps) > 0


def test_keys_pooled_along_the_sequence_are_captured_and_their_layout_refused() -> None:
    """6 keys for a grid of 4 x 6 look just like those of a 2 x 2 reduction, and lie elsewhere."""
    maps, skipped = captured(Tokens(PooledAlongTheSequence(), Attention()), images())
    assert skipped == {}
    assert maps[0].shape == (2, 4, 24, 6)
    assert says(refusal_of_the_loss(maps), "layer 0 (blocks.0)", "6 keys pooled along the sequence of 24", "layers=")
    assert affinity_loss(layers=[1])(maps, maps) > 0


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
