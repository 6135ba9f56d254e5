"""Views against torch's own flips, turns and interpolation, against loops over coordinates, and as algebra."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import Compose, HorizontalFlip, Identity, Lattice, Rotate90, Scale, VerticalFlip, View
from acr_reg.views.view import map_between
from tests.support.attention import generator, says
from tests.support.oracles import chain, filter_row, mirror, resampled_affinity, stay, token_moves, turn, upend

# Each exact view, what torch calls it, and the same said of coordinates.
EXACT = {
    "identity": (Identity(), lambda x: x, stay),
    "horizontal": (HorizontalFlip(), lambda x: x.flip(-1), mirror),
    "vertical": (VerticalFlip(), lambda x: x.flip(-2), upend),
    "turn 0": (Rotate90(0), lambda x: x, stay),
    "turn 1": (Rotate90(1), lambda x: torch.rot90(x, 1, (-2, -1)), turn),
    "turn 2": (Rotate90(2), lambda x: torch.rot90(x, 2, (-2, -1)), chain(turn, turn)),
    "turn 3": (Rotate90(3), lambda x: torch.rot90(x, 3, (-2, -1)), chain(turn, turn, turn)),
    "turn -1": (Rotate90(-1), lambda x: torch.rot90(x, -1, (-2, -1)), chain(turn, turn, turn)),
    "transposition": (Compose([Rotate90(1), VerticalFlip()]), lambda x: x.mT, chain(turn, upend)),
    "turned mirror": (
        Compose([HorizontalFlip(), Rotate90(1), VerticalFlip()]),
        lambda x: torch.rot90(x.flip(-1), 1, (-2, -1)).flip(-2),
        chain(mirror, turn, upend),
    ),
}
any_exact = pytest.mark.parametrize("name", EXACT)
SIZES = [(4, 6), (6, 4), (5, 3), (1, 7), (7, 1), (2, 33)]
any_size = pytest.mark.parametrize("size", SIZES, ids=str)
FACTORS = [2.0, 0.5, 1.5, 0.75, 1 / 3, 3.0, 1.1, (0.5, 2.0), (1.0, 0.7), (1.3, 1.0)]


def ramp(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def interpolate(images, size):
    assert size[1] > 1  # torch 2.14 on a CPU is wrong for outputs one pixel wide (not for ones one pixel high)
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


# Images and dense maps


@any_exact
@any_size
def test_exact_views_are_torchs_own_to_the_bit(name, size):
    view, reference, _ = EXACT[name]
    images = noise(2, 3, *size)
    assert torch.equal(view(images), reference(images))
    assert view.output_size(size) == tuple(reference(images).shape[-2:])


@any_exact
@any_size
def test_exact_views_round_trip_to_the_bit(name, size):
    view, _, _ = EXACT[name]
    images = noise(2, 3, *size)
    assert torch.equal(view.inverse(view(images)), images)
    assert torch.equal(view(view.inverse(images)), images)
    assert torch.equal(view.align(view(images), size), images)


@any_exact
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_exact_views_take_every_dtype(name, dtype):
    view, reference, _ = EXACT[name]
    images = (10 * noise(1, 2, 4, 6)).to(dtype)
    assert view(images).dtype == dtype
    assert torch.equal(view(images), reference(images))


@any_exact
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 2, 3, 4, 6), (0, 3, 4, 6)], ids=str)
def test_leading_axes_are_free(name, shape):
    view, reference, _ = EXACT[name]
    assert torch.equal(view(noise(*shape)), reference(noise(*shape)))


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (12, 8), (15, 32), (3, 40)], ids=str)
def test_scale_is_bilinear_interpolation(factor, size):
    view, images = Scale(factor), noise(2, 3, *size, dtype=torch.float64)
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    target = tuple(round(s * f) for s, f in zip(size, factors, strict=True))
    assert view.output_size(size) == target
    torch.testing.assert_close(view(images), interpolate(images, target), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(view(images.float()), interpolate(images, target).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 9), (17, 2), (8, 12), (3, 4)], ids=str)
@any_exact
def test_any_target_size_is_interpolation_of_the_view(name, size):
    """Maps come at any resolution: those of the view are carried back onto the images' grid."""
    view, reference, _ = EXACT[name]
    images = noise(2, 3, 8, 12)
    torch.testing.assert_close(view(images, size), interpolate(reference(images), size), rtol=1e-5, atol=1e-5)
    maps = noise(2, 3, *reference(images).shape[-2:])
    undone = EXACT[name][0].inverse(maps)
    torch.testing.assert_close(view.align(maps, size), interpolate(undone, size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5], ids=str)
def test_align_undoes_a_scale_onto_the_images_grid(factor):
    view, images = Scale(factor), noise(2, 3, 6, 10)
    there = view(images)
    back = view.align(there, (6, 10))
    torch.testing.assert_close(back, interpolate(there, (6, 10)), rtol=1e-5, atol=1e-5)
    assert view.align(there, (3, 5)).shape == (2, 3, 3, 5)


def test_scale_by_one_is_exact():
    images = ramp(1, 1, 4, 6, dtype=torch.int64)
    assert torch.equal(Scale(1)(images), images)
    assert Scale(1.0) == Identity()


def test_one_column_is_resampled_along_its_rows():
    column = noise(2, 3, 7, 1)
    torch.testing.assert_close(Scale((1.5, 1))(column), interpolate(column.expand(2, 3, 7, 4), (10, 4))[..., :1])


def test_constants_stay_constant_under_every_scale():
    for factor in FACTORS:
        assert Scale(factor)(torch.full((1, 2, 8, 9), 0.7)).sub(0.7).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resampled_in_float32_and_rounded_once(dtype):
    images = noise(1, 2, 9, 14).to(dtype)
    found = Scale(0.5)(images)
    assert found.dtype == dtype
    exact = interpolate(images.double(), tuple(found.shape[-2:]))
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Scale(0.5)(images.float()), Scale(0.5)(images.float().clone()))
        assert torch.equal(Scale(0.5)(images), found)


def test_autocast_does_not_touch_a_resampling():
    images = noise(1, 2, 9, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Scale(0.5)(images)
    assert torch.equal(cast, Scale(0.5)(images))


def test_the_input_is_not_changed_or_shared():
    images = noise(1, 2, 4, 6)
    before = images.clone()
    for view in (HorizontalFlip(), Identity(), Scale(2)):
        view(images).zero_()
        assert torch.equal(images, before)


# Composition and inverse


@pytest.mark.parametrize("names", list(itertools.product(EXACT, repeat=2)), ids="-".join)
def test_compose_is_the_sequence(names):
    views = [EXACT[name][0] for name in names]
    images = noise(1, 2, 4, 6)
    composed = Compose(views)
    assert torch.equal(composed(images), views[1](views[0](images)))
    assert torch.equal(composed.inverse(composed(images)), images)
    assert torch.equal(composed.inverse(composed(images)), views[0].inverse(views[1].inverse(composed(images))))


@any_exact
@pytest.mark.parametrize("factor", [2.0, 0.5, (0.5, 2.0)], ids=str)
def test_compose_with_a_scale_is_the_sequence(name, factor):
    view, images, scale = EXACT[name][0], noise(1, 2, 8, 12), Scale(factor)
    for views in ([view, scale], [scale, view]):
        composed = Compose(views)
        expected = views[1](views[0](images))
        assert composed.output_size((8, 12)) == tuple(expected.shape[-2:])
        torch.testing.assert_close(composed(images), expected, rtol=1e-5, atol=1e-5)
        assert composed.inverse(composed(images)).shape == images.shape
        backward = views[0].inverse(views[1].inverse(expected))
        torch.testing.assert_close(composed.inverse(expected), backward, rtol=1e-5, atol=1e-5)


def test_composed_scales_resample_once():
    images = noise(1, 2, 8, 12)
    assert Compose([Scale(2), Scale(0.5)])(images).equal(images)
    torch.testing.assert_close(Compose([Scale(0.5), Scale(0.5)])(images), Scale(0.25)(images), rtol=1e-6, atol=1e-6)


def test_compose_of_three_nested_and_empty():
    images = noise(1, 1, 4, 6)
    views = [Rotate90(1), HorizontalFlip(), VerticalFlip()]
    one_by_one = VerticalFlip()(HorizontalFlip()(Rotate90(1)(images)))
    assert torch.equal(Compose(views)(images), one_by_one)
    assert torch.equal(Compose([Compose(views[:2]), views[2]])(images), one_by_one)
    assert torch.equal(Compose((views[0], Compose(views[1:])))(images), one_by_one)
    assert Compose([]) == Identity()


@any_exact
def test_inverse_of_the_inverse_is_the_view(name):
    view = EXACT[name][0]
    assert view.inverse.inverse == view
    assert Compose([view, view.inverse]) == Identity()
    assert Compose([view.inverse, view]) == Identity()


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_inverse_of_a_scale(factor):
    view, images = Compose([Rotate90(), Scale(factor)]), noise(1, 1, 60, 120)
    assert view.inverse(view(images)).shape == images.shape
    odd = noise(1, 1, 7, 15)
    assert view.align(view(odd), (7, 15)).shape == odd.shape
    twice = view.inverse.inverse
    torch.testing.assert_close(twice(images), view(images), rtol=1e-5, atol=1e-5)


def test_views_that_do_the_same_are_equal_and_hash_alike():
    same = [
        (Rotate90(2), Compose([HorizontalFlip(), VerticalFlip()])),
        (Rotate90(3), Rotate90(-1)),
        (Rotate90(5), Rotate90(1)),
        (Rotate90(1).inverse, Rotate90(3)),
        (HorizontalFlip().inverse, HorizontalFlip()),
        (Compose([Rotate90(1), Rotate90(1)]), Rotate90(2)),
        (Compose([Rotate90(1), HorizontalFlip()]), Compose([VerticalFlip(), Rotate90(1)])),
        (Scale(2).inverse, Scale(0.5)),
        (Scale((2, 0.5)), Scale((2.0, 0.5))),
        (Compose([Scale((2, 0.5)), Rotate90()]), Compose([Rotate90(), Scale((0.5, 2))])),
    ]
    for one, other in same:
        assert one == other
        assert hash(one) == hash(other)
    distinct = [
        Identity(),
        HorizontalFlip(),
        VerticalFlip(),
        Rotate90(1),
        Rotate90(2),
        Rotate90(3),
        Scale(2),
        Scale((2, 1)),
    ]
    assert len(set(distinct)) == len(distinct)


def test_views_are_immutable():
    with pytest.raises(AttributeError):
        HorizontalFlip().affines = ()


ALL_VIEWS = [view for view, _, _ in EXACT.values()] + [Scale(0.5), Scale((2, 3)), Compose([Scale(2), Rotate90()])]


@pytest.mark.parametrize("view", ALL_VIEWS + [view.inverse for view in ALL_VIEWS], ids=repr)
def test_views_are_copied_and_pickled(view):
    images = noise(1, 1, 4, 6)
    for other in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        assert other == view
        assert hash(other) == hash(view)
        assert repr(other) == repr(view)
        assert torch.equal(other(images), view(images))


def test_views_are_printed_as_they_are_written():
    for text in [
        "Identity()",
        "HorizontalFlip()",
        "VerticalFlip()",
        "Rotate90(1)",
        "Rotate90(3)",
        "Scale(0.5)",
        "Scale((2, 0.5))",
        "Compose([HorizontalFlip(), Scale(2)])",
        "Scale(2).inverse",
        "Compose([Rotate90(1), Compose([VerticalFlip(), Scale(0.5).inverse])]).inverse",
    ]:
        view = eval(text)
        assert repr(view) == text
        assert isinstance(view, View)
    assert repr(Scale(2).inverse.inverse) == "Scale(2)"


@given(
    moves=st.lists(st.sampled_from([n for n in EXACT if n != "identity"]), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda s: s[0] != s[1]),
)
@settings(max_examples=60, deadline=None)
def test_any_chain_of_exact_views_moves_tokens_as_coordinates_move(moves, size):
    view, move = Compose([EXACT[n][0] for n in moves]), chain(*(EXACT[n][2] for n in moves))
    images = ramp(*size, dtype=torch.int64)
    moved, targets = view(images), token_moves(move, size)[0]
    for source, target in enumerate(targets):
        assert moved.flatten()[target] == source
    assert torch.equal(view.inverse(moved), images)
    assert view.inverse.inverse == view


@given(
    factors=st.tuples(st.floats(0.4, 3), st.floats(0.4, 3)),
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)).filter(lambda s: s[0] != s[1]),
    name=st.sampled_from(list(EXACT)),
)
@settings(max_examples=60, deadline=None)
def test_every_scale_of_every_view_is_interpolation(factors, size, name):
    view, reference, _ = EXACT[name]
    images = noise(1, 1, *size, dtype=torch.float64)
    composed = Compose([view, Scale(factors)])
    turned = reference(images)
    target = tuple(round(s * f) for s, f in zip(turned.shape[-2:], factors, strict=True))
    assert composed.output_size(size) == target
    torch.testing.assert_close(composed(images), interpolate(turned, target), rtol=1e-6, atol=1e-6)


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=9), factor=st.floats(0.3, 4))
@settings(max_examples=60, deadline=None)
def test_a_resampling_stays_within_the_range_of_its_source(values, factor):
    row = torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1).expand(1, 1, 4, -1)
    scaled = Scale(factor)(row)
    assert scaled.min() >= row.min() - 1e-9
    assert scaled.max() <= row.max() + 1e-9


# Gradient


@pytest.mark.parametrize("view", ALL_VIEWS, ids=repr)
def test_gradient_flows(view):
    images = noise(1, 2, 4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(view, (images,))
    (grad,) = torch.autograd.grad(view(images).sum(), images)
    assert (grad > 0).all()
    assert torch.autograd.gradcheck(lambda maps: view.align(maps, (3, 5)), (images,))


@pytest.mark.parametrize("view", [HorizontalFlip(), Scale(0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_first_used_in_inference_mode_serves_training(view, dtype):
    size = (11, 13) if dtype == torch.float32 else (13, 11)  # a size of its own: maps are cached
    with torch.inference_mode():
        evaluated = view(torch.ones(1, 1, *size, dtype=dtype))
    images = torch.ones(1, 1, *size, dtype=dtype).requires_grad_()
    view(images).sum().backward()
    assert torch.equal(view(images).detach(), evaluated)
    assert (images.grad > 0).all()


# Token lattices


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
        assert forward.index()[0, target] == token
        assert back.index()[0, token] == target
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
            assert mapping.index()[0, token] == i * 5 + 5 - j


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


# Bad input


def test_integer_images_cannot_be_resampled():
    images = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8") as error:
        Scale(2)(images)
    assert says(error, "(1, 3, 4, 6)", "Scale(2)", ".float()")
    with pytest.raises(TypeError, match="uint8") as error:
        HorizontalFlip()(images, (5, 7))
    assert says(error, "HorizontalFlip()")


def test_what_is_no_image():
    with pytest.raises(TypeError, match=r"\(6,\)") as error:
        HorizontalFlip()(torch.zeros(6))
    assert says(error, "(..., H, W)")
    for other, kind in [([[1.0, 2.0]], "list"), (torch.zeros(4, 6).numpy(), "ndarray")]:
        with pytest.raises(TypeError, match=kind) as error:
            HorizontalFlip()(other)
        assert says(error, "tensor", "(..., H, W)")


@pytest.mark.parametrize("factor", [0, -1, (1, 0), float("nan"), (2, float("inf"))], ids=str)
def test_scales_that_are_none(factor):
    with pytest.raises(ValueError, match="scale of") as error:
        Scale(factor)
    assert says(error, str(factor), "positive")


def test_a_scale_that_leaves_nothing():
    with pytest.raises(ValueError, match="leaves 0 x 1") as error:
        Scale((0.1, 0.2))(torch.zeros(1, 1, 4, 6))
    assert says(error, "Scale((0.1, 0.2))", "4 x 6", "at least 1 x 1")


def test_a_quarter_turn_is_whole():
    with pytest.raises(TypeError, match=r"1\.5") as error:
        Rotate90(1.5)
    assert says(error, "quarter turns")


def test_compose_takes_views():
    with pytest.raises(TypeError, match="str") as error:
        Compose([HorizontalFlip(), "rotate"])
    assert says(error, "View")
    with pytest.raises(TypeError, match="View") as error:
        Compose(HorizontalFlip())
    assert says(error, "Compose([")
