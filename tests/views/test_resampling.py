"""Values carried between lattices of tokens: by an index where centres coincide, by bilinear weights elsewhere, and the
boundary between both from either side."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from acr_reg import Compose, Crop, HorizontalFlip, Identity, Lattice, Rotate90, Scale, VerticalFlip
from acr_reg.views.view import blur_between, map_between
from tests.support.oracles import filter_row, resampled_affinity, token_moves
from tests.support.views import EXACT, any_exact, noise

PLACES = {
    "horizontal": (HorizontalFlip(), lambda y, x: (y, 1 - x)),
    "vertical": (VerticalFlip(), lambda y, x: (1 - y, x)),
    "turn 1": (Rotate90(1), lambda y, x: (x, 1 - y)),
    "turn 3": (Rotate90(3), lambda y, x: (1 - x, y)),
    "composed": (Compose([HorizontalFlip(), VerticalFlip()]), lambda y, x: (1 - y, 1 - x)),
}
STEMS = {
    # A strided 3 x 3 convolution, padding 1: centres at whole multiples of the stride, a quarter token off at stride 2.
    "offset": {"stride": (2.0, 2.0), "offset": (-0.5, -0.5)},
    "offset of its own on each axis": {"stride": (4.0, 4.0), "offset": (-0.5, -1.5)},
    "not divisible": {"stride": (16.0, 16.0), "extent": (70.0, 101.0)},
    "beyond the image": {"stride": (4.0, 4.0), "offset": (-0.5, -6.5)},  # as a stem with a wide padding has
    "both": {"stride": (14.0, 14.0), "offset": (2.0, -2.0), "extent": (62.0, 90.0)},
}
GRID = (5, 7)


# Lattices under exact views


@any_exact
@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (3, 5), (1, 5)], ids=str)
def test_token_index_is_the_coordinates_moved_by_a_loop(name, grid):
    view, _, move = EXACT[name]
    targets, grid_b = token_moves(move, grid)
    forward = map_between(view, Lattice(*grid), Lattice(*grid_b), "cpu")
    back = map_between(view.inverse, Lattice(*grid_b), Lattice(*grid), "cpu")
    for mapping in (forward, back):
        assert mapping.is_exact
        assert mapping.is_permutation
        assert mapping.valid.all()
    for token, target in enumerate(targets):
        assert forward.index[0, target] == token
        assert back.index[0, token] == target
    values = noise(2, len(targets), 3)
    moved = torch.empty_like(values)
    for token, target in enumerate(targets):
        moved[:, target] = values[:, token]
    assert torch.equal(forward.tokens(values, dim=1), moved)
    assert torch.equal(back.tokens(moved, dim=1), values)
    assert torch.equal(forward.tokens(values.mT), moved.mT)


@any_exact
def test_tokens_move_as_the_pixels_beneath_them(name):
    """Patches of 4 x 3 pixels: the mean of a view's patches is the view of the means."""
    view, reference, _ = EXACT[name]
    images = noise(1, 1, 16, 18)
    patch_b = (3, 4) if view.affines[0].transposed else (4, 3)
    source = Lattice(4, 6, (4.0, 3.0))
    target = Lattice(*((6, 4) if view.affines[0].transposed else (4, 6)), tuple(map(float, patch_b)))
    tokens = F.avg_pool2d(images, (4, 3)).flatten(-2)
    expected = F.avg_pool2d(reference(images), patch_b).flatten(-2)
    torch.testing.assert_close(map_between(view, source, target, "cpu").tokens(tokens), expected)


# Lattices that do not fall on each other


def centres(lattice):
    """The centre of every token, (y, x) over the image's extent, in [0, 1]."""
    return [
        (
            (lattice.offset[0] + (i + 0.5) * lattice.stride[0]) / lattice.extent[0],
            (lattice.offset[1] + (j + 0.5) * lattice.stride[1]) / lattice.extent[1],
        )
        for i in range(lattice.height)
        for j in range(lattice.width)
    ]


def token_weights(source, target, back, shrink=(1.0, 1.0)):
    """Weights (target token, source token): ``back`` leads from a centre on the target to the place on the source."""
    rows, valid = [], []
    for y, x in (back(*centre) for centre in centres(target)):
        i = (y * source.extent[0] - source.offset[0]) / source.stride[0] - 0.5
        j = (x * source.extent[1] - source.offset[1]) / source.stride[1] - 0.5
        along_y, along_x = filter_row(i, shrink[0], source.height), filter_row(j, shrink[1], source.width)
        rows.append([a * b for a in along_y for b in along_x])
        valid.append(-0.5 <= i <= source.height - 0.5 and -0.5 <= j <= source.width - 0.5)
    return rows, valid


def stem_lattice(stem, grid):
    """The lattice of a stem on an image, and on that image turned by 90 degrees where ``grid`` is."""
    fields = {"extent": tuple(n * s for n, s in zip((4, 6), STEMS[stem]["stride"], strict=True)), **STEMS[stem]}
    if grid == (6, 4):
        fields["extent"] = fields["extent"][::-1]
    return Lattice(*grid, **fields)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("stem", STEMS)
def test_lattices_that_do_not_mirror_onto_themselves_are_mapped_by_centres(name, stem):
    view, back = PLACES[name]
    source = stem_lattice(stem, (4, 6))
    target = stem_lattice(stem, (6, 4) if view.affines[0].transposed else (4, 6))
    mapping = map_between(view, source, target, "cpu")
    weights, valid = token_weights(source, target, back)
    assert not mapping.is_exact
    assert mapping.valid.tolist() == [valid]
    values = noise(3, 24, dtype=torch.float64)
    shown = torch.tensor(weights, dtype=torch.float64) * torch.tensor(valid)[:, None]
    torch.testing.assert_close(mapping.tokens(values), values @ shown.mT, rtol=1e-9, atol=1e-9)
    on_tokens = noise(24, 3, dtype=torch.float64)
    torch.testing.assert_close(mapping.tokens(on_tokens, dim=0), shown @ on_tokens)


def test_a_coordinate_ramp_tells_where_every_token_lies():
    """Inside the image a bilinear map of the centres' own coordinates gives back the mirrored centre."""
    lattice = Lattice(4, 6, (16.0, 16.0), extent=(70.0, 101.0))
    x = torch.tensor([place[1] * 101 for place in centres(lattice)], dtype=torch.float64)
    mirrored = map_between(HorizontalFlip(), lattice, lattice, "cpu").tokens(x)
    reachable = (101 - x >= 8) & (101 - x <= 88)
    assert reachable.sum() >= 20
    torch.testing.assert_close(mirrored[reachable], (101 - x)[reachable])


def test_a_whole_token_shift_is_an_index_with_a_validity():
    """Centres on multiples of the stride, not between them: token j falls on n - j, and token 0 on no token."""
    lattice = Lattice(3, 5, (4.0, 4.0), (0.0, -2.0), (12.0, 20.0))
    mapping = map_between(HorizontalFlip(), lattice, lattice, "cpu")
    assert mapping.is_exact
    assert not mapping.is_permutation
    for i, j in itertools.product(range(3), range(5)):
        token = i * 5 + j
        assert mapping.valid[0, token] == (j > 0)
        if j > 0:
            assert mapping.index[0, token] == i * 5 + 5 - j


def test_a_lattice_is_symmetric_to_the_precision_of_floats():
    """14 px patches, and fractions of pixels, still fall on each other; a hundredth of a token does not."""
    for stride in (14.0, 16.0, 1 / 3, 7.3):
        lattice = Lattice(37, 53, (stride, stride))
        assert map_between(HorizontalFlip(), lattice, lattice, "cpu").is_permutation
        assert map_between(Rotate90(), lattice, Lattice(53, 37, (stride, stride)), "cpu").is_permutation
        shifted = Lattice(37, 53, (stride, stride), (0.0, 0.01 * stride), lattice.extent)
        assert not map_between(HorizontalFlip(), shifted, shifted, "cpu").is_exact


@pytest.mark.parametrize(
    ("grid", "grid_b"), [((2, 3), (4, 6)), ((4, 6), (2, 3)), ((3, 4), (4, 6)), ((4, 3), (4, 6))], ids=str
)
def test_resampled_affinity_equals_a_dense_loop(grid, grid_b):
    """Carried back from the view's grid: both axes through the same filter, each row with the mass that it had."""
    view = Scale((grid_b[0] / grid[0], grid_b[1] / grid[1]))
    source, target = Lattice(*grid_b), Lattice(*grid)
    shrink = (grid_b[0] / grid[0], grid_b[1] / grid[1])
    weights, valid = token_weights(source, target, lambda y, x: (y, x), shrink)
    assert all(valid)
    mapping = map_between(view.inverse, source, target, "cpu")
    affinity = noise(len(source), len(source), dtype=torch.float64).softmax(-1) * 0.8
    moved = mapping.tokens(affinity)
    moved = moved * affinity.sum(-1, keepdim=True) / moved.sum(-1, keepdim=True)
    found = mapping.tokens(moved, dim=-2)
    expected = torch.tensor(resampled_affinity(affinity.tolist(), weights, weights), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.full((len(target),), 0.8, dtype=torch.float64))


def test_maps_of_views_are_kept_by_what_the_views_do():
    """Two equal views have one map."""
    lattices = (Lattice(3, 4, (4.0, 4.0)), Lattice(2, 2, (4.0, 4.0)))
    made = [map_between(Crop(4, 8, 8, 8, (8, 8), image_size=(12, 16)), *lattices, "cpu") for _ in range(2)]
    assert made[0] is made[1]


# The boundary: offsets in tokens


def shifted(by, stride=16.0):
    """Patches of an image, and patches of the same image ``by`` (y, x) tokens further on."""
    source = Lattice(*GRID, (stride, stride))
    return source, Lattice(*GRID, (stride, stride), (by[0] * stride, by[1] * stride), source.extent)


def shift_by_loop(values, by):
    """Tokens (..., N) read at ``by`` tokens further on, with a loop over tokens."""
    rows, columns = GRID
    moved = torch.zeros_like(values)
    for i, j in itertools.product(range(rows), range(columns)):
        y, x = i + by[0], j + by[1]
        if -0.5 <= y <= rows - 0.5 and -0.5 <= x <= columns - 0.5:
            weights = torch.tensor(
                [[a * b for b in filter_row(x, 1, columns)] for a in filter_row(y, 1, rows)], dtype=values.dtype
            )
            moved[..., i * columns + j] = (values * weights.flatten()).sum(-1)
    return moved


@pytest.mark.parametrize("stride", [1.0, 14.0, 16.0, 1 / 3])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("whole", [0, 1, -2])
def test_a_ten_thousandth_of_a_token_is_where_resampling_begins(stride, axis, whole):
    values = noise(2, 35, dtype=torch.float64)
    found = {}
    for offset in (-1.1e-4, -0.9e-4, 0.0, 0.9e-4, 1.1e-4):
        by = [0.0, 0.0]
        by[axis] = whole + offset
        mapping = map_between(Identity(), *shifted(by, stride), "cpu")
        assert mapping.is_exact == (abs(offset) < 1e-4)
        found[offset] = (mapping.tokens(values), mapping.valid)
    exact, valid = found[0.0]
    for offset, (moved, shown) in found.items():
        assert torch.equal(shown, valid) or abs(offset) > 1e-4
        assert torch.equal(moved, exact) == (abs(offset) < 1e-4)
        both = shown & valid
        assert (moved - exact).abs()[:, both[0]].max() < 1e-3
    by[axis] = whole
    torch.testing.assert_close(exact, shift_by_loop(values, by), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("offset", [1e-3, 0.1, 0.25, 0.499, 0.5, 0.501, 0.9, 1.0, 1.5, -0.5, -1.0])
def test_between_tokens_it_is_bilinear(axis, offset):
    by = [0.0, 0.0]
    by[axis] = offset
    values = noise(2, 35, dtype=torch.float64)
    mapping = map_between(Identity(), *shifted(by), "cpu")
    assert mapping.is_exact == (offset == round(offset))
    torch.testing.assert_close(mapping.tokens(values), shift_by_loop(values, by), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("view", [HorizontalFlip(), VerticalFlip(), Rotate90(), Rotate90(2)], ids=repr)
def test_mirrored_the_boundary_is_where_both_offsets_add_up(view):
    """A lattice off its image's middle by d falls on its mirror image off by 2 d."""
    values = noise(1, 25, dtype=torch.float64)
    moved = {}
    for d in (0.0, 0.45e-4, 0.55e-4):
        lattice = Lattice(5, 5, (16.0, 16.0), (16 * d, 16 * d), (80.0, 80.0))
        mapping = map_between(view, lattice, lattice, "cpu")
        assert mapping.is_exact == (d < 0.5e-4)
        moved[d] = mapping.tokens(values)
    assert torch.equal(moved[0.0], moved[0.45e-4])
    assert 0 < (moved[0.0] - moved[0.55e-4]).abs().max() < 1e-3


# The boundary: scales near 1, and boxes


def test_a_scale_near_one_is_exact_until_its_outermost_token_leaves():
    """On 41 pixels the outermost is 20 from the middle: a scale of 1 + e moves it by 20 e."""
    images = noise(1, 2, 41, 41, dtype=torch.float64)
    for tiny, exact in [(4.5e-6, True), (-4.5e-6, True), (5.5e-6, False), (-5.5e-6, False)]:
        view = Scale(1 + tiny, keep_size=True)
        mapping = map_between(view, Lattice(41, 41), Lattice(41, 41), "cpu")
        assert mapping.is_exact == exact
        assert torch.equal(view(images), images) == exact
        assert (view(images) - images).abs().max() < 1e-3
        assert view.valid((41, 41)).all()
        if exact:
            assert torch.equal(view(images.byte()), images.byte())
        else:
            with pytest.raises(TypeError, match="uint8"):
                view(images.byte())


def test_a_single_token_is_exact_by_its_step():
    """One token has no neighbour to tell the scale by; the step does."""
    for factor, exact in [(1 + 0.9e-4, True), (1 + 1.2e-4, False), (1.5, False)]:
        mapping = map_between(Scale(factor, keep_size=True), Lattice(1, 1), Lattice(1, 1), "cpu")
        assert mapping.is_exact == exact
        torch.testing.assert_close(mapping.tokens(torch.tensor([[3.0]])), torch.tensor([[3.0]]))


def test_a_crop_of_whole_tokens_is_an_index_and_one_pixel_off_is_none():
    """Patches of 16 px: boxes from pixel 15, 16 and 17."""
    source, target = Lattice(4, 6, (16.0, 16.0)), Lattice(2, 3, (16.0, 16.0))
    values = noise(1, 24, dtype=torch.float64)
    kinds = {}
    for top, left in itertools.product((15, 16, 17), (31, 32, 33)):
        view = Crop(top, left, 32, 48, image_size=(64, 96))
        mapping = map_between(view, source, target, "cpu")
        assert mapping.valid.all()
        kinds[top, left] = mapping.is_exact
        shift = ((top - 16) / 16, (left - 32) / 16)
        for i, j in itertools.product(range(2), range(3)):
            y, x = 1 + i + shift[0], 2 + j + shift[1]
            low = (top // 16, left // 16)  # only tokens of which the box shows a part are read
            high = ((top + 31) // 16, (left + 47) // 16)
            along_y = filter_row(y - low[0], 1, high[0] - low[0] + 1)
            along_x = filter_row(x - low[1], 1, high[1] - low[1] + 1)
            part = values.reshape(4, 6)[low[0] : high[0] + 1, low[1] : high[1] + 1]
            expected = torch.tensor(along_y, dtype=torch.float64) @ part @ torch.tensor(along_x, dtype=torch.float64)
            torch.testing.assert_close(mapping.tokens(values)[0, i * 3 + j], expected, rtol=1e-9, atol=1e-9)
    assert [box for box, exact in kinds.items() if exact] == [(16, 32)]


@pytest.mark.parametrize(
    ("left", "width", "shown"), [(8, 64, [0, 1, 2, 3, 4]), (9, 63, [1, 2, 3]), (8, 63, [0, 1, 2, 3])], ids=str
)
def test_a_centre_on_the_edge_of_a_box_is_shown(left, width, shown):
    """A box from the centre of one token of 16 px to that of another; a pixel less, and it is not."""
    source, target = Lattice(1, width // 16, (16.0, 16.0), extent=(16.0, float(width))), Lattice(1, 6, (16.0, 16.0))
    view = Crop(0, left, 16, width, image_size=(16, 96))
    valid = map_between(view.inverse, source, target, "cpu").valid[0]
    assert valid.nonzero().flatten().tolist() == shown


# Blurring the target as much as the map blurs


@pytest.mark.parametrize("factor", [2.0, 0.5, (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("turns", [0, 1])
def test_the_blur_has_the_variance_of_the_map(factor, turns):
    """A parabola rises by the variance of the weights: by equally much, away from the edges."""
    view = Compose([Scale(factor), Rotate90(turns)])
    image, other = Lattice(12, 12), Lattice(*view.output_size((12, 12)))
    places = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    blur = blur_between(view.inverse, other, image, "cpu")
    for axis in (0, 1):
        parabola = places.square()
        own = (parabola[:, None] if axis == 0 else parabola).expand(12, 12)
        seen = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (other.height, other.width)]
        along = axis if not turns else 1 - axis
        values = (seen[along] if not turns or axis == 0 else 1 - seen[along]).square()
        viewed = (values[:, None] if along == 0 else values).expand(other.height, other.width)
        carried = map_between(view.inverse, other, image, "cpu")(viewed)
        inner = (slice(3, -3), slice(3, -3))
        assert ((carried - own)[inner] > 1e-4).all()
        torch.testing.assert_close(blur(own)[inner], carried[inner], rtol=0, atol=1e-12)


def test_the_blur_of_an_exact_map_changes_nothing_and_any_other_keeps_constants():
    tokens = Lattice(5, 7)
    assert blur_between(HorizontalFlip(), tokens, tokens, "cpu").is_permutation
    blur = blur_between(Scale(2).inverse, Lattice(10, 14), tokens, "cpu")
    torch.testing.assert_close(blur.tokens(torch.ones(1, 35)), torch.ones(1, 35))
