"""Propagation of class maps over the affinity, and merging of views."""

from __future__ import annotations

import pytest
import torch

from acr_reg import (
    AttentionMaps,
    HorizontalFlip,
    Identity,
    Rotate90,
    Scale,
    capture_attention,
    multi_view_cam,
    propagate_cam,
)
from tests.support.attention import explicit, layout_of, says
from tests.support.fused import fused_copy
from tests.support.models import explicit_vit


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_propagation_is_the_summed_affinity_times_the_map() -> None:
    maps = [torch.rand(2, 3, 25, 25).softmax(-1) for _ in range(3)]
    attention = AttentionMaps.from_tensors(maps, num_prefix_tokens=1, grid=(4, 6))
    cam = torch.rand(2, 5, 4, 6, requires_grad=True)
    for layers, chosen in ((None, [0, 1, 2]), ([-1, 0], [2, 0])):
        affinity = sum(maps[i][:, :, 1:, 1:].mean(1) for i in chosen)
        expected = torch.einsum("bij,bcj->bci", affinity, cam.flatten(2)).reshape_as(cam)
        torch.testing.assert_close(propagate_cam(cam, attention, layers), expected)
        twice = torch.einsum("bij,bcj->bci", affinity, expected.flatten(2)).reshape_as(cam)
        torch.testing.assert_close(propagate_cam(cam, attention, layers, steps=2), twice)
    assert torch.autograd.grad(propagate_cam(cam, attention).sum(), cam)[0].amin() > 0
    with pytest.raises(ValueError, match=r"\(2, 5, 6, 4\)") as error:
        propagate_cam(cam.mT, attention)
    assert says(error, "(2, C, 4, 6)", "before resizing")
    with pytest.raises(ValueError, match="steps=0 "):
        propagate_cam(cam, attention, steps=0)


def test_propagation_from_factors_equals_that_from_maps() -> None:
    explicit = explicit_vit().double()
    images, cam = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 3, 4, 6, dtype=torch.float64)
    found = []
    for model in (explicit, fused_copy(explicit)):
        with capture_attention(model) as attention:
            model(images)
            found.append(propagate_cam(cam, attention.take()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("view", [HorizontalFlip(), Rotate90(1), Rotate90(3)], ids=repr)
def test_views_are_undone_before_they_are_merged(view: object) -> None:
    images = torch.rand(2, 3, 8, 12)
    merged = multi_view_cam(lambda x: x[:, :2], images, [Identity(), view])
    assert torch.equal(merged, 2 * images[:, :2])
    assert torch.equal(multi_view_cam(lambda x: x[:, :2], images, [view], merge="max"), images[:, :2])


def test_views_of_other_sizes_meet_on_one_grid() -> None:
    rows = torch.linspace(0, 1, 32)[:, None].expand(32, 48)
    images = rows.expand(1, 3, 32, 48)
    pooled = lambda x: torch.nn.functional.avg_pool2d(x, 4)[:, :1]  # noqa: E731
    merged = multi_view_cam(pooled, images, [Identity(), Scale(2), Scale(0.5)])
    assert merged.shape == (1, 1, 8, 12)
    torch.testing.assert_close(merged[0, 0, 2:-2, 0] / 3, pooled(images)[0, 0, 2:-2, 0], rtol=0, atol=1e-2)
    assert multi_view_cam(pooled, images, [Scale(2)], size=(5, 7)).shape == (1, 1, 5, 7)
    with pytest.raises(ValueError, match="cam_fn") as error:
        multi_view_cam(lambda x: x[:, 0], images, [Identity()])
    assert says(error, "(1, 32, 48)", "(1, C, h, w)")
    with pytest.raises(ValueError, match="no views") as error:
        multi_view_cam(pooled, images, [])
    assert says(error, "Identity()")
    with pytest.raises(ValueError, match="merge='median'") as error:
        multi_view_cam(pooled, images, [Identity()], merge="median")  # type: ignore[arg-type]
    assert says(error, '"sum", "max" or "mean"')


def test_propagation_over_layers_on_several_grids_names_those_that_share_one() -> None:
    maps, grids = torch.rand(2, 3, 24, 24).softmax(-1), [(4, 6), (6, 4), (4, 6)]
    mixed = AttentionMaps([explicit(maps, layout_of(grid, 0, ()), index) for index, grid in enumerate(grids)])
    with pytest.raises(ValueError, match=r"layers \[1\]") as error:
        propagate_cam(torch.rand(2, 5, 4, 6), mixed)
    assert says(error, "4 x 6 grid of layer 2", "over layers [0, 2]")


def test_nan_is_an_error_and_not_a_map() -> None:
    attention = AttentionMaps.from_tensors([torch.rand(2, 3, 25, 25).softmax(-1)], num_prefix_tokens=1, grid=(4, 6))
    with pytest.raises(ValueError, match="propagated maps have NaN or infinite values"):
        propagate_cam(torch.full((2, 5, 4, 6), float("nan")), attention)
