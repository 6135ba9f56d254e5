"""Models that make views of their images themselves: each run's tokens lie on the images that this run reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acr_reg import (
    AllPairsConsistencyLoss,
    Compose,
    Crop,
    HorizontalFlip,
    Rotate90,
    Scale,
    VerticalFlip,
    capture_attention,
)
from tests.support.models.tokens import SIZE, Attention, Tokens

# On images as small as these, resizing to twice the size also looks like padding.
pytestmark = pytest.mark.filterwarnings("ignore:The model pads images")

VIEWS = [
    HorizontalFlip(),
    Rotate90(),
    Scale(2),
    Crop(0, 16, 16, 32, image_size=SIZE),
    Compose([VerticalFlip(), Rotate90(), Scale(0.5)]),
]


class Siamese(nn.Module):
    def __init__(self, view, encoder, other=None):
        super().__init__()
        self.encoder, self.other, self.view = encoder, encoder if other is None else other, view

    def forward(self, x):
        return self.encoder(x), self.other(self.view(x))


def vit(**options):
    return Tokens(Attention(**options), Attention(**options))


def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
@pytest.mark.parametrize("view", VIEWS, ids=repr)
def test_a_view_made_within_the_model_gives_the_maps_of_one_made_outside(view, fused):
    torch.manual_seed(0)
    encoder = vit(fused=fused)
    with capture_attention(encoder) as attention:
        expected = [(encoder(batch), attention.take())[1] for batch in (images(), view(images()))]
    model = Siamese(view, encoder)
    with capture_attention(model, keep="all") as attention:
        for _ in range(3):  # from the second on, only attention is watched
            model(images())
            runs = attention.take_all()
            assert [run[0].layout for run in runs] == [run[0].layout for run in expected]
            acr = AllPairsConsistencyLoss(view, activation_weight=0)
            torch.testing.assert_close(acr(*runs), acr(*expected))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(-1),
        lambda x: torch.roll(x, 8, -1),
        lambda x: F.interpolate(x, scale_factor=0.5),
        lambda x: x[..., 8:, :32],
        lambda x: F.pad(x, (8, 8, 0, 8)),
    ],
    ids=["flipped", "rolled", "resized", "cropped", "padded"],
)
def test_the_second_of_two_encoders_has_a_grid_of_its_own(change):
    model = Siamese(change, vit(), vit())
    size = [side // 8 for side in change(images()).shape[2:]]
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            model(images())
            first, second = attention.take_all()
            assert [str(layer.layout.query) for layer in first] == ["4 x 6"] * 2
            assert [str(layer.layout.query) for layer in second] == [f"{size[0]} x {size[1]}"] * 2


class ColumnsFirst(Tokens):
    def embed(self, x):
        return super().embed(x.mT)


class ColumnsInside(Tokens):
    def embed(self, x):
        return self.patches(x).mT.flatten(2).mT


def test_another_order_is_found_out_in_the_run_that_has_it():
    """In a single run, what the model does to its images changes the order of its tokens."""
    wrong = ColumnsFirst(Attention(), Attention())
    with capture_attention(wrong) as attention:
        wrong(images())
        assert "no grid" in attention.take()[0].why_unplaced
    model = Siamese(nn.Identity(), vit(), ColumnsInside(Attention(), Attention()))
    with capture_attention(model, keep="all") as attention:
        for _ in range(2):
            model(images())
            first, second = attention.take_all()
            assert first[0].why_unplaced is None
            assert "no grid" in second[0].why_unplaced
