"""Propagation of class maps over the affinity, and merging of views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acr_reg import (
    AttentionMaps,
    Crop,
    HorizontalFlip,
    Identity,
    Rotate90,
    Scale,
    View,
    capture_attention,
    multi_view_cam,
    propagate_cam,
)
from acr_reg.errors import SizeError
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


@pytest.mark.parametrize(
    "views", [[Identity()], [Identity(), HorizontalFlip()], [Rotate90(), HorizontalFlip()]], ids=str
)
@pytest.mark.parametrize("merge", ["sum", "max", "mean"])
def test_scales_are_every_view_resized_by_hand_and_its_maps_brought_back(views: list[View], merge: str) -> None:
    images, scales = torch.rand(2, 3, 32, 48), [0.5, 1.0, 1.5]
    pooled = lambda x: F.avg_pool2d(x, 4)[:, :2].square()  # noqa: E731
    found = multi_view_cam(pooled, images, views, merge, scales=scales)  # type: ignore[arg-type]
    by_hand = []
    for view in views:
        for scale in scales:
            seen = view(images)
            size = [round(scale * side) for side in seen.shape[-2:]]
            maps = pooled(F.interpolate(seen, size=size, mode="bilinear", antialias=True, align_corners=False))
            back = view.inverse(maps)
            by_hand.append(F.interpolate(back, size=(8, 12), mode="bilinear", antialias=True, align_corners=False))
    stacked = torch.stack(by_hand)
    merged = {"sum": stacked.sum(0), "max": stacked.amax(0), "mean": stacked.mean(0)}[merge]
    assert found.shape == (2, 2, 8, 12)
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-5)


def test_scales_of_a_crop_of_odd_sizes_and_alone_keep_their_place() -> None:
    images = torch.linspace(0, 1, 48).expand(1, 3, 32, 48)
    crop = Crop(0, 8, 32, 24, image_size=(32, 48))
    twice = multi_view_cam(lambda x: x, images, [crop], "mean", scales=[2.0, 1.0])
    assert (twice[..., :8] == 0).all() and (twice[..., 32:] == 0).all()
    torch.testing.assert_close(twice[..., 9:31], images[..., 9:31], rtol=0, atol=1e-5)
    assert multi_view_cam(lambda x: x, images, [Identity()], scales=[0.5]).shape == images.shape
    assert multi_view_cam(lambda x: x, images[..., :45], [Identity()], scales=[0.7, 1.0]).shape[-1] == 45


def test_scales_that_are_none_and_a_model_of_one_size() -> None:
    images = torch.rand(1, 3, 32, 48)
    for scales, error, word in [
        (0.5, TypeError, "scales="),
        ([], ValueError, "no scales"),
        ([0.0], ValueError, "0.0"),
        (["a"], ValueError, "scale is a"),
        ([-1.0], ValueError, "-1"),
    ]:
        with pytest.raises(error, match=word):
            multi_view_cam(lambda x: x, images, [Identity()], scales=scales)  # type: ignore[arg-type]

    def fixed(x: Tensor) -> Tensor:
        if x.shape[-1] != 48:
            raise AssertionError("Input width doesn't match model.")
        return x

    with pytest.raises(SizeError, match=r"16 x 24 px: Input width.*dynamic_img_size=True"):
        multi_view_cam(fixed, images, [Identity()], scales=[1.0, 0.5])
    with pytest.raises(AssertionError, match="Input width"):  # nothing was resized
        multi_view_cam(fixed, images[..., :40], [Identity()])


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
