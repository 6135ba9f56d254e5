"""Which of the tensors that a model is given or makes is the image."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import capture_attention
from tests.support.capturing import captured, grids, images
from tests.support.models import explicit_vit
from tests.support.models.tokens import GRID, SIZE, Attention, OnMaps, Rows, Tokens


def narrow_stem() -> list[nn.Module]:
    """Three convolutions, of which the second reads 4 channels and the third 2."""
    channels = (3, 4, 2, 32)
    return [nn.Conv2d(channels[i], channels[i + 1], 3, 2, 1) for i in range(3)]


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


def test_images_padded_by_the_model_are_warned_of_once() -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, num_classes=5, depth=1
    )
    with capture_attention(model) as attention:
        model(images(size=(32, 48)))
        attention.take()
    with capture_attention(model) as attention:
        model(images(size=(26, 42)))
        with pytest.warns(UserWarning, match=r"26 x 42 px.*32 x 48.*\b6 px"):
            attention.take()
        model(images(size=(26, 42)))
        attention.take()


def test_no_image_outlives_its_run() -> None:
    model = explicit_vit(1)
    with capture_attention(model) as attention:
        batch = images()
        model.proj(batch)
        probe = weakref.ref(batch)
        del batch
        gc.collect()
        assert probe() is None
        model(images())
        assert len(attention.take()) == 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "pvt_v2_b0"])
@pytest.mark.parametrize("bands", [1, 2, 5, 13])
def test_images_of_any_number_of_bands_if_told(name: str, bands: int) -> None:
    size = {"img_size": 64} if "vit" in name else {}
    layouts = []
    for channels in (3, bands):
        model = timm.create_model(name, num_classes=5, in_chans=channels, **size)
        with capture_attention(model, image_channels=channels) as attention:
            for _ in range(2):  # the second run watches fewer modules
                model(torch.rand(2, channels, 64, 64))
                layouts.append([layer.layout for layer in attention.take()])
    assert layouts[0] == layouts[1] == layouts[2] == layouts[3]
