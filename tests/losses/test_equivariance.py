"""Equivariance by use: networks that commute with the view, exactly, have no loss under it, and much under another.

Every token is made of its own patch alone, by its centre pixel, and there are no positions: a flip, a quarter turn, a
crop or a padding of whole tokens moves tokens and changes none. So does one layer's attention, but for its softmax,
which a crop takes over fewer keys. What follows a first layer of attention knows of tokens that a crop cuts off: such
depth commutes with flips and turns only, which is why ``deep`` is for those.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acr_reg import (
    AllPairsConsistencyLoss,
    AttentionMaps,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    Lattice,
    PerImage,
    Rotate90,
    Scale,
    TokenLayout,
    VerticalFlip,
    View,
    align_attention,
    capture_attention,
)
from tests.support.attention import generator
from tests.support.pairs import aligned_rows

PATCH = 3  # px: odd, so that it has a centre
GRID = (6, 10)
SIZE = (PATCH * GRID[0], PATCH * GRID[1])
SQUARE = (PATCH * 8, PATCH * 8)
WIDTH = 12
TOLERANCE = 1e-6


# ---- networks


class Heads(nn.Module):
    """Attention whose heads differ much in sharpness: from nearly uniform to nearly one-hot."""

    def __init__(self, fused: bool, heads: int = 4, reduce: int = 1) -> None:
        super().__init__()
        self.fused, self.num_heads, self.reduce = fused, heads, reduce
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        sharpness = torch.logspace(0.0, 1.3, heads).repeat_interleave(WIDTH // heads)
        self.qkv.weight.data = torch.randn(3 * WIDTH, WIDTH, generator=generator(1)) * 0.5
        self.qkv.weight.data[:WIDTH] *= sharpness[:, None]
        self.qkv.bias.data.zero_()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        keys = x
        if self.reduce > 1:  # whole cells of tokens: each key is the mean of its own
            keys = F.avg_pool2d(x.mT.unflatten(2, grid), self.reduce).flatten(2).mT
        q, _, _ = self._split(x)
        _, k, v = self._split(keys)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return x + y.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class CentrePixels(nn.Conv2d):
    """A patch embedding that reads each patch's centre pixel."""

    def __init__(self, patch: int = PATCH) -> None:
        super().__init__(3, WIDTH, patch, patch, bias=False)
        centre = torch.randn(WIDTH, 3, generator=generator(2))
        self.weight.data.zero_()
        self.weight.data[:, :, patch // 2, patch // 2] = centre


class Toy(nn.Module):
    """A plain vision transformer without positions. ``cam`` is a linear class map of each token by itself."""

    def __init__(self, prefix: int = 1, fused: bool = True, depth: int = 1) -> None:
        super().__init__()
        self.patch_embed = CentrePixels()
        self.prefix = nn.Parameter(torch.randn(1, prefix, WIDTH, generator=generator(3)))
        self.blocks = nn.ModuleList(Heads(fused) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight.data = torch.randn(5, WIDTH, generator=generator(4))

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        maps = self.patch_embed(x)
        return torch.cat([self.prefix.expand(len(x), -1, -1), maps.flatten(2).mT], 1), maps.shape[2:]

    def forward(self, x: Tensor) -> Tensor:
        tokens, grid = self.tokens(x)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return self.head(tokens).mean(1)

    def cam(self, x: Tensor) -> Tensor:
        return torch.einsum("bdhw,cd->bchw", self.patch_embed(x), self.head.weight)


class Pyramid(Toy):
    """Two stages on lattices of their own, the keys of the first on a third lattice; the second is made of the stem's
    tokens, not of what attention mixed, so that crops of its whole tokens change none of them."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__(0, fused)
        self.blocks = nn.ModuleList([Heads(fused, reduce=2), Heads(fused)])

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patch_embed(x)
        first = self.blocks[0](maps.flatten(2).mT, maps.shape[2:])
        merged = F.avg_pool2d(maps, 2)
        second = self.blocks[1](merged.flatten(2).mT, merged.shape[2:])
        return self.head(first).mean(1) + self.head(second).mean(1)


def images(size: tuple[int, int] = SIZE, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, *size, generator=generator(5)).to(dtype)


def capture(model: Toy, *batches: Tensor, classes: int | None = None) -> list[AttentionMaps]:
    prefix = model.prefix.shape[1]
    given = {"num_prefix_tokens": prefix, "class_tokens": min(1, prefix) if classes is None else classes}
    maps = []
    with capture_attention(model, **({} if isinstance(model, Pyramid) else given)) as attention:
        for batch in batches:
            model(batch)
            maps.append(attention.take())
    return maps


def agreement(a: AttentionMaps, b: AttentionMaps, view: View, valid: Tensor | None = None) -> float:
    """How far the rows of both views are apart at most, of any layer and head, on valid pairs of tokens."""
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        for rows in aligned_rows(one, other, view, valid):
            row_a, row_b, weight = rows.comparable("each")
            apart = (row_a - row_b).masked_fill(~rows.keys_valid[:, None, None], 0).abs().amax(-1)
            patches = rows.shown & rows.counted  # rows of class tokens, before them, are always compared
            compared = F.pad(patches, (rows.num_classes, 0), value=True)[:, None]
            if weight is not None:
                compared = compared & (weight > 1e-12)
            worst = max([worst, *apart[compared.expand_as(apart)].tolist()])
    return worst


def losses(model: Toy, x: Tensor, y: Tensor, a: AttentionMaps, b: AttentionMaps, **call: object) -> dict[str, float]:
    """All terms, with class maps on the tokens' grid and, each token over its pixels, on the images'."""
    acr = AllPairsConsistencyLoss(activation_weight=0.0 if not a[0].layout.class_tokens else 1.0, affinity_weight=1.0)
    found = {}
    cams = model.cam(x), model.cam(y)
    of_pixels = tuple(cam.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3) for cam in cams)
    for name, maps in (("cam", cams), ("pixels", of_pixels)):
        loss, terms = acr(a, b, *maps, return_terms=True, **call)
        found |= {key: value.item() for key, value in terms.items() if key in ("activation", "affinity")}
        found |= {name: terms["cam"].item(), f"loss {name}": loss.item()}
        assert terms["entropy"] < 0.8  # else there is little to be consistent about
    return found


def check_zero(found: dict[str, float]) -> None:
    assert all(0 <= value < TOLERANCE for value in found.values()), found


def check_far(found: dict[str, float]) -> None:
    """Every term that there is."""
    assert all(value > 0.05 for value in found.values()), found


def px(top: int, left: int, height: int, width: int, size: tuple[int, int] = SIZE, pad: bool = False) -> View:
    """A crop in tokens."""
    return Crop(PATCH * top, PATCH * left, PATCH * height, PATCH * width, image_size=size, pad=pad)


# Each with one that it is not, of the same output size.
WHOLE = {
    "identity": (Identity(), HorizontalFlip()),
    "horizontal": (HorizontalFlip(), VerticalFlip()),
    "vertical": (VerticalFlip(), HorizontalFlip()),
    "half turn": (Rotate90(2), HorizontalFlip()),
    "quarter turn": (Rotate90(1), Rotate90(3)),
    "turned and flipped": (Compose([HorizontalFlip(), Rotate90(1)]), Rotate90(1)),
}
PARTS = {
    "crop": (px(1, 2, 4, 6), px(0, 3, 4, 6)),
    "strip": (px(0, 4, 6, 2), px(0, 5, 6, 2)),
    "crop, flipped": (Compose([px(1, 2, 4, 6), HorizontalFlip()]), px(1, 2, 4, 6)),
    "flipped, crop": (Compose([HorizontalFlip(), px(1, 1, 4, 6)]), Compose([VerticalFlip(), px(1, 1, 4, 6)])),
    "crop, turned": (Compose([px(2, 1, 3, 7), Rotate90(1)]), Compose([px(2, 1, 3, 7), Rotate90(3)])),
    "crop of a crop": (
        Compose([px(1, 1, 5, 8), px(1, 2, 3, 5, (PATCH * 5, PATCH * 8))]),
        Compose([px(0, 1, 5, 8), px(1, 2, 3, 5, (PATCH * 5, PATCH * 8))]),
    ),
    "moved, padded": (px(-2, 3, 6, 10, pad=True), px(-1, 3, 6, 10, pad=True)),
    "padded on two sides": (px(0, 0, 8, 13, pad=True), px(-1, 0, 8, 13, pad=True)),
    "padded all around": (px(-1, -2, 8, 14, pad=True), px(-2, -2, 8, 14, pad=True)),
    "padded and flipped": (
        Compose([px(-1, 0, 8, 12, pad=True), VerticalFlip()]),
        Compose([px(-1, 0, 8, 12, pad=True), HorizontalFlip()]),
    ),
}
VIEWS = WHOLE | PARTS
any_view = pytest.mark.parametrize("name", VIEWS)
kernel = pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])


# ---- one view


@any_view
@pytest.mark.parametrize(
    ("fused", "dtype"), [(True, torch.float64), (False, torch.float64), (True, torch.float32)], ids=str
)
def test_a_network_that_commutes_with_the_view_has_no_loss(name: str, fused: bool, dtype: torch.dtype) -> None:
    view, other = VIEWS[name]
    model, x = Toy(1, fused).to(dtype), images(dtype=dtype)
    a, b = capture(model, x, view(x))
    assert agreement(a, b, view) < TOLERANCE
    check_zero(losses(model, x, view(x), a, b, view=view))
    assert agreement(a, b, other) > 0.1
    check_far(losses(model, x, view(x), a, b, view=other))


@pytest.mark.parametrize("name", ["horizontal", "quarter turn", "crop", "crop, turned", "moved, padded"])
@pytest.mark.parametrize(("prefix", "classes"), [(0, 0), (5, 1), (20, 20), (24, 20)])
def test_whatever_tokens_stand_before_the_patches(name: str, prefix: int, classes: int) -> None:
    view, other = VIEWS[name]
    model, x = Toy(prefix).double(), images()
    a, b = capture(model, x, view(x), classes=classes)
    assert agreement(a, b, view) < TOLERANCE
    check_zero(losses(model, x, view(x), a, b, view=view))
    wrong = losses(model, x, view(x), a, b, view=other)
    assert min(wrong["affinity"], wrong["cam"]) > 0.05
    assert classes == 0 or wrong["activation"] > 0.02  # 24 prefix tokens leave little to the patches


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("distance", ["l1", "l2", "js"])
@pytest.mark.parametrize("name", ["crop", "crop, turned", "padded all around"])
def test_by_every_distance_and_for_every_head(name: str, distance: str, heads: str) -> None:
    view, other = VIEWS[name]
    model, x = Toy().double(), images()
    a, b = capture(model, x, view(x))
    acr = AllPairsConsistencyLoss(view, 1.0, 1.0, distance=distance, heads=heads)
    assert acr(a, b) < TOLERANCE
    assert acr(a, b, view=other) > 0.05


@pytest.mark.parametrize("name", ["crop", "flipped, crop", "padded all around"])
@pytest.mark.parametrize("sharpest", [1e1, 1e2, 1e3])
def test_a_head_that_gives_nothing_to_the_common_region_has_no_say_in_it(name: str, sharpest: float) -> None:
    """Beside a head that does: what is left of its row underflows, and a view that shows only that region has a full
    row of the same head."""
    view, _ = VIEWS[name]
    model, x = Toy().double(), images()
    model.blocks[0].qkv.weight.data[: WIDTH // 4] *= sharpest
    a, b = capture(model, x, view(x))
    for acr in (AllPairsConsistencyLoss(view, 1.0, 1.0, heads=heads) for heads in ("each", "mean")):
        assert acr(a, b) < TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
@kernel
def test_deep_networks_commute_with_what_shows_all(name: str, fused: bool) -> None:
    view, other = WHOLE[name]
    model, x = Toy(2, fused, depth=3).double(), images()
    a, b = capture(model, x, view(x), classes=1)
    assert len(a) == 3
    assert agreement(a, b, view) < TOLERANCE
    check_zero(losses(model, x, view(x), a, b, view=view))
    check_far(losses(model, x, view(x), a, b, view=other))


def test_deep_networks_do_not_commute_with_a_crop() -> None:
    """What a crop cuts off reaches the second layer through the first: a loss is due, and of the second layer only."""
    view, x = PARTS["crop"][0], images()
    model = Toy(depth=2).double()
    a, b = capture(model, x, view(x))
    first, second = (AllPairsConsistencyLoss(view, 1.0, 1.0, layers=[layer])(a, b) for layer in (0, 1))
    assert first < TOLERANCE
    assert second > 0.05


@pytest.mark.parametrize(
    ("view", "other"),
    [
        WHOLE["horizontal"],
        WHOLE["vertical"],
        WHOLE["quarter turn"],
        (px(2, 2, 4, 6), px(0, 4, 4, 6)),
        (Compose([px(2, 2, 4, 6), Rotate90(1)]), Compose([px(2, 2, 4, 6), Rotate90(3)])),
        (px(-2, -4, 10, 16, pad=True), px(-4, -2, 10, 16, pad=True)),
    ],
    ids=repr,
)
@kernel
def test_a_lattice_for_each_layer_and_one_for_its_keys(view: View, other: View, fused: bool) -> None:
    model, x = Pyramid(fused).double(), images()
    a, b = capture(model, x, view(x))
    assert [str(layer.layout.query) for layer in a] == ["6 x 10", "3 x 5"]
    assert [str(layer.layout.key) for layer in a] == ["3 x 5", "3 x 5"]
    assert agreement(a, b, view) < TOLERANCE
    check_zero(losses(model, x, view(x), a, b, view=view))
    check_far(losses(model, x, view(x), a, b, view=other))


# ---- a view of each image


def per_image(*views: View) -> View:
    return PerImage(list(views))


SQUARES = {
    "turns and flips": per_image(Rotate90(1), VerticalFlip(), Compose([Rotate90(3), HorizontalFlip()])),
    "boxes": per_image(*(px(i, j, 5, 5, SQUARE) for i, j in ((0, 3), (2, 1), (3, 0)))),
    "boxes, one turned": per_image(
        px(0, 3, 5, 5, SQUARE), Compose([px(2, 1, 5, 5, SQUARE), Rotate90(1)]), px(3, 0, 5, 5, SQUARE)
    ),
    "whole, in part, little": per_image(
        px(0, 0, 8, 8, SQUARE), px(-3, 2, 8, 8, SQUARE, pad=True), px(7, -7, 8, 8, SQUARE, pad=True)
    ),
}


@pytest.mark.parametrize("name", SQUARES)
@kernel
def test_a_view_of_each_image(name: str, fused: bool) -> None:
    view = SQUARES[name]
    model, x = Toy(2, fused).double(), images(SQUARE, batch=3)
    y = view(x)
    for i in range(3):
        assert torch.equal(y[i], view.of_image(i)(x[i : i + 1])[0])
    a, b = capture(model, x, y, classes=1)
    assert agreement(a, b, view) < TOLERANCE
    check_zero(losses(model, x, y, a, b, view=view))
    rolled = PerImage([view.of_image(i) for i in (1, 2, 0)])
    check_far(losses(model, x, y, a, b, view=rolled))
    together = capture(model, torch.cat([x, y]), classes=1)[0].chunk(2) if y.shape == x.shape else (a, b)
    check_zero(losses(model, x, y, *together, view=view))


# ---- both sides augmented

PAIRS = {
    "two boxes": (px(0, 1, 4, 7), px(2, 0, 4, 7)),
    "boxes of two sizes": (px(0, 1, 4, 7), px(1, 2, 5, 8)),
    "a box and its neighbour turned": (px(0, 0, 4, 8), Compose([px(2, 3, 4, 6), Rotate90(1)])),
    "flipped and a box": (HorizontalFlip(), px(1, 3, 4, 6)),
    "a box and all, flipped": (px(1, 3, 4, 6), VerticalFlip()),
    "both padded": (px(-1, 2, 6, 10, pad=True), Compose([px(1, -3, 6, 10, pad=True), HorizontalFlip()])),
    "both padded all around": (px(-1, -2, 8, 14, pad=True), px(-2, -1, 9, 12, pad=True)),
    "corners that meet": (px(0, 0, 4, 6), px(1, 3, 5, 7)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_augmented_views_meet_on_what_both_show(name: str, dtype: torch.dtype) -> None:
    view_a, view_b = PAIRS[name]
    model, images_of_all = Toy().to(dtype), images(dtype=dtype)
    x, y = view_a(images_of_all), view_b(images_of_all)
    a, b = capture(model, x, y)
    relation = Compose([view_a.inverse, view_b])
    assert agreement(a, b, relation) < TOLERANCE
    found = losses(model, x, y, a, b, view=view_b, view_a=view_a)
    check_zero(found)
    swapped = AllPairsConsistencyLoss(view_a, 1.0, 1.0)(b, a, view_a=view_b)
    assert swapped < TOLERANCE
    flipped = Compose([view_a, Rotate90(2)])
    wrong = losses(model, x, y, a, b, view=view_b, view_a=flipped)
    assert wrong["affinity"] > 50 * max(TOLERANCE, found["affinity"])
    assert wrong["loss cam"] > 0.05


def test_two_augmented_views_of_each_image() -> None:
    boxes = [[(0, 3), (2, 1), (3, 0)], [(1, 1), (0, 2), (3, 3)]]
    view_a, view_b = (per_image(*(px(i, j, 5, 5, SQUARE) for i, j in each)) for each in boxes)
    view_b = Compose([view_b, per_image(HorizontalFlip(), Rotate90(1), Identity())])
    model, everything = Toy().double(), images(SQUARE, batch=3)
    x, y = view_a(everything), view_b(everything)
    a, b = capture(model, torch.cat([x, y]))[0].chunk(2)
    check_zero(losses(model, x, y, a, b, view=view_b, view_a=view_a))
    rolled = PerImage([view_a.of_image(i) for i in (1, 2, 0)])
    check_far(losses(model, x, y, a, b, view=view_b, view_a=rolled))


# ---- padding


@pytest.mark.parametrize("resolution", [1, PATCH, 2 * PATCH], ids=["tokens", "pixels", "finer"])
@pytest.mark.parametrize("name", ["identity", "horizontal", "quarter turn", "crop", "moved, padded"])
def test_what_a_host_padded_with_zeros_is_left_out(name: str, resolution: int) -> None:
    """The padding of the second view holds other values, as after a host's normalisation: without ``valid`` they
    count."""
    view, _ = VIEWS[name]
    model, x = Toy().double(), images()
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, :, 7:] = valid[1, 4:] = False
    pixels = valid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    first, second = x.masked_fill(~pixels, 0), view(x.masked_fill(~pixels, 1.5))
    a, b = capture(model, first, second)
    given = valid.repeat_interleave(resolution, 1).repeat_interleave(resolution, 2)
    assert agreement(a, b, view, given) < TOLERANCE
    check_zero(losses(model, first, second, a, b, view=view, valid=given))
    assert AllPairsConsistencyLoss(view, 1.0, 1.0)(a, b) > 0.05


@pytest.mark.parametrize("resolution", [1, PATCH, 2 * PATCH], ids=["tokens", "pixels", "finer"])
def test_what_a_host_padded_is_left_out_of_two_augmented_views(resolution: int) -> None:
    """``valid`` is of the images before either view, at any resolution."""
    view_a, view_b = px(0, 1, 5, 8), Compose([px(1, 2, 5, 8), HorizontalFlip()])
    model, everything = Toy().double(), images()
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, :, 7:] = valid[1, 4:] = False
    pixels = valid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    x, y = view_a(everything.masked_fill(~pixels, 0)), view_b(everything.masked_fill(~pixels, 1.5))
    a, b = capture(model, x, y)
    given = valid.repeat_interleave(resolution, 1).repeat_interleave(resolution, 2)
    check_zero(losses(model, x, y, a, b, view=view_b, view_a=view_a, valid=given))
    assert AllPairsConsistencyLoss(view_b, 1.0, 1.0)(a, b, view_a=view_a) > 0.05


# ---- scale: exact where the centre pixels of a fixed grid's cells stay centres


@pytest.mark.parametrize("factor", [3.0, 5.0, (3.0, 1.0)], ids=str)
def test_scale_on_a_fixed_grid_moves_no_token(factor: float | tuple[float, float]) -> None:
    """A network that brings every image to one grid: its tokens lie where they lay, on cells ``factor`` times as
    large. Resampled bilinearly by an odd factor, the centre of a cell keeps its pixel."""
    view, model, x = Scale(factor), Toy().double(), images()
    by = (factor, factor) if isinstance(factor, float) else factor
    y = view(x)[..., int(by[0]) // 2 :: int(by[0]), int(by[1]) // 2 :: int(by[1])]
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    a, b = (maps[0].weights() for maps in capture(model, x, y))
    lattices = [Lattice(*GRID, (PATCH * s, PATCH * t)) for s, t in ((1.0, 1.0), by)]
    source, target = (TokenLayout(lattice, lattice, 1, (0,)) for lattice in reversed(lattices))
    assert (align_attention(b, view, source, target) - a).abs().max() < TOLERANCE
    flipped = align_attention(b, Compose([view, HorizontalFlip()]), source, target)
    assert (flipped - a).abs().max() > 0.1


# ---- gradient


@pytest.mark.parametrize("name", ["horizontal", "quarter turn", "crop", "crop, flipped", "padded all around"])
@kernel
def test_there_is_nothing_to_learn_where_views_agree(name: str, fused: bool) -> None:
    """Of a distance that is smooth at 0; under another view there is."""
    view, other = VIEWS[name]
    model, x = Toy(1, fused).double(), images()
    of_view, of_other = (
        torch.autograd.grad(
            AllPairsConsistencyLoss(given, 1.0, 1.0, distance="l2")(*capture(model, x, view(x))),
            model.blocks[0].qkv.weight,
        )[0]
        for given in (view, other)
    )
    assert of_view.abs().max() < 1e-8
    assert of_other.abs().max() > 1e-3
