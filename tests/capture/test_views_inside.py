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
from tests.support.models.tokens import GRID, SIZE, Attention, Tokens

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
        pytest.param(lambda x: F.pad(x, (8, 8, 0, 8)), marks=pytest.mark.filterwarnings("ignore:The model pads")),
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


class TwoSizes(nn.Module):
    """Takes images of two sizes in one call, the second of as many more pixels as padding would add."""

    def __init__(self, normalise):
        super().__init__()
        self.encoder, self.normalise = vit(), normalise

    def forward(self, a, b):
        return self.encoder(self.normalise(a)), self.encoder(self.normalise(b))


@pytest.mark.parametrize("normalise", [lambda x: x, lambda x: (x - 0.5) / 0.2], ids=["as given", "normalised"])
def test_images_of_two_sizes_in_one_call_are_not_taken_for_padding(normalise):
    height, width = SIZE
    model = TwoSizes(normalise)
    with capture_attention(model, keep="all") as attention:
        for _ in range(3):
            model(images(), torch.rand(2, 3, height + 16, width + 16))
            small, large = attention.take_all()
            for maps, size in ((small, GRID), (large, (GRID[0] + 2, GRID[1] + 2))):
                assert (maps[0].layout.query.height, maps[0].layout.query.width) == size


def _into_zeros(x, extra):
    padded = x.new_zeros(*x.shape[:2], x.shape[2] + extra, x.shape[3] + extra)
    padded[..., : x.shape[2], : x.shape[3]] = x
    return padded


PADDING = {
    "pad": lambda x, extra: F.pad(x, (0, extra, 0, extra)),
    "around": lambda x, extra: F.pad(x, (extra // 2,) * 4, mode="reflect"),
    "written into zeros": _into_zeros,
    "joined": lambda x, extra: torch.cat([x, x.new_zeros(*x.shape[:3], extra)], 3),
}


@pytest.mark.parametrize("pad", PADDING.values(), ids=PADDING)
def test_padding_is_told_however_the_model_adds_it(pad):
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = vit()

        def forward(self, x):
            return self.encoder(pad(x, 16))

    model = Padding()
    with capture_attention(model) as attention:
        model(images())
        with pytest.warns(UserWarning, match="The model pads images of"):
            attention.take()
