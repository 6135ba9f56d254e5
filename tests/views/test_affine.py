"""Views as algebra: composition is the sequence, inverses undo, and views that do the same are equal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import Compose, Crop, HorizontalFlip, Identity, PerImage, Rotate90, Scale, VerticalFlip
from tests.support.attention import says
from tests.support.oracles import chain, token_moves
from tests.support.views import EXACT, EXACT_CROPS, SIZE, any_exact, noise, ramp

STEPS = {
    "flip": lambda size: HorizontalFlip(),
    "upend": lambda size: VerticalFlip(),
    "turn": lambda size: Rotate90(),
    "turn back": lambda size: Rotate90(3),
    "crop": lambda size: Crop(1, 2, size[0] - 3, size[1] - 2, image_size=size),
    "pad": lambda size: Crop(-2, -1, size[0] + 3, size[1] + 4, image_size=size, pad=True),
    "crop and pad": lambda size: Crop(2, -3, size[0], size[1], image_size=size, pad=True),
}
TURNS = list(STEPS)[:4]
RESIZED = {
    "scale": lambda size: Scale(1.5),
    "resize": lambda size: Crop(1, 0, size[0] - 2, size[1] - 1, size=(9, 7), image_size=size),
    "scale in place": lambda size: Scale(0.6, keep_size=True),
}


def steps_of(names, size):
    views = []
    for name in names:
        views.append({**STEPS, **RESIZED}[name](size))
        size = views[-1].output_size(size)
    return views


def one_by_one(views, images):
    """The images and what is shown of them, step by step."""
    valid = torch.ones(1, 1, *images.shape[-2:], dtype=torch.bool)
    for view in views:
        valid = view(valid.double()) > 0.5
        images = view(images)
    return images, valid[0]


# Composition


@pytest.mark.parametrize("names", list(itertools.product(EXACT, repeat=2)), ids="-".join)
def test_compose_is_the_sequence(names):
    views = [EXACT[name][0] for name in names]
    images = noise(1, 2, 4, 6)
    composed = Compose(views)
    assert torch.equal(composed(images), views[1](views[0](images)))
    assert torch.equal(composed.inverse(composed(images)), images)
    assert torch.equal(composed.inverse(composed(images)), views[0].inverse(views[1].inverse(composed(images))))


@pytest.mark.parametrize(
    "names",
    [*itertools.product(STEPS, repeat=2), *itertools.product(["turn", *list(STEPS)[4:]], repeat=3)],
    ids="-".join,
)
def test_compose_of_exact_steps_is_the_sequence_to_the_bit(names):
    views, images = steps_of(names, (10, 13)), noise(2, 2, 10, 13)
    composed = Compose(views)
    expected, valid = one_by_one(views, images)
    assert torch.equal(composed(images), expected)
    assert torch.equal(composed.valid((10, 13)), valid)
    shown = composed.inverse(composed(images))
    assert torch.equal(shown, images.where(composed.inverse.valid(expected.shape[-2:]), torch.zeros(())))
    assert composed.inverse.inverse == composed
    assert Compose([view.inverse for view in reversed(views)]) == composed.inverse


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


@pytest.mark.parametrize("resized", RESIZED)
@pytest.mark.parametrize("names", list(itertools.product(TURNS, repeat=2)), ids="-".join)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_compose_with_one_resampling_is_the_sequence(resized, names, place):
    views = steps_of([*names[:place], resized, *names[place:]], (8, 12))
    images = noise(2, 2, 8, 12, dtype=torch.float64)
    expected, valid = one_by_one(views, images)
    composed = Compose(views)
    assert composed.output_size((8, 12)) == tuple(expected.shape[-2:])
    assert torch.equal(composed.valid((8, 12)), valid)
    torch.testing.assert_close(composed(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("resized", RESIZED)
@pytest.mark.parametrize("last", ["crop", "pad", "crop and pad"])
def test_a_resampling_and_then_whole_pixels_is_the_sequence(resized, last):
    views, images = steps_of([resized, "flip", last], (8, 12)), noise(2, 2, 8, 12, dtype=torch.float64)
    composed = Compose(views)
    expected, valid = one_by_one(views, images)
    assert torch.equal(composed.valid((8, 12)), valid)
    inner = (..., slice(3, -3), slice(3, -3))  # nearer the edge a crop of a scaled image could read beyond it
    torch.testing.assert_close(composed(images)[inner], expected[inner], rtol=1e-9, atol=1e-9)


def test_a_padded_crop_and_then_a_resampling_reads_no_padding():
    """The sequence would blend zeros in at the border; one resampling of the image's own pixels does not."""
    ones = torch.ones(1, 1, 8, 12)
    pad = Crop(-3, -4, 14, 20, image_size=(8, 12), pad=True)
    view = Compose([pad, Scale(0.7)])
    assert (view(ones)[0, 0] - view.valid((8, 12))[0].float()).abs().max() < 1e-6


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


def test_compose_of_views_of_each_image():
    images = noise(4, 2, 12, 16)
    flips = [HorizontalFlip(), Identity(), Identity(), VerticalFlip()]
    composed = Compose([PerImage(flips), PerImage(EXACT_CROPS), Rotate90()])
    assert torch.equal(composed(images), Rotate90()(PerImage(EXACT_CROPS)(PerImage(flips)(images))))
    assert composed == PerImage([Compose([f, c, Rotate90()]) for f, c in zip(flips, EXACT_CROPS, strict=True)])
    for image in range(4):
        assert composed.of_image(image) == Compose([flips[image], EXACT_CROPS[image], Rotate90()])


def test_crops_that_share_nothing_show_nothing():
    around = Crop(-8, 0, 8 + 12, 16, image_size=(12, 16), pad=True)
    nothing = Compose([around, Crop(0, 0, 8, 16, image_size=(20, 16))])
    images = noise(1, 1, 12, 16)
    assert not nothing.shows_anything
    assert not nothing.valid((12, 16)).any()
    assert torch.equal(nothing(images), torch.zeros(1, 1, 8, 16))
    assert torch.equal(nothing.inverse(nothing(images)), torch.zeros_like(images))
    assert nothing.inverse.inverse == nothing
    for more in (Compose([HorizontalFlip(), nothing]), Compose([nothing, Rotate90()])):
        assert not more.shows_anything
        assert not more(images).any()
    assert Compose([around, Compose([Crop(0, 0, 8, 16, image_size=(20, 16)), Scale(2)])]) == Compose(
        [nothing, Scale(2)]
    )


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


def test_each_composed_crop_is_for_the_output_of_the_one_before():
    first, second = Crop(0, 0, 8, 9, image_size=SIZE), Crop(0, 0, 4, 4, image_size=(9, 8))
    with pytest.raises(ValueError, match="8 x 9") as error:
        Compose([first, second])
    assert says(error, repr(first), repr(second), "9 x 8")
    Compose([first, Rotate90(), second])


def test_a_scale_rounds_and_a_crop_of_the_rounded_size_follows():
    """33 px by 0.3 are 10, not 9.9; of those 10 the crop shows all, at 224 px."""
    views = [Scale(0.3), Crop(0, 0, 10, 10, size=224, image_size=(10, 10))]
    images = noise(1, 1, 33, 33)
    sequence = views[1](views[0](images))
    assert Compose(views)(images).shape == sequence.shape


def test_a_scale_and_its_inverse_leave_a_crop_bound_to_its_images():
    steps = [Scale(2), Scale(0.5), Crop(0, 0, 4, 4, image_size=(8, 8))]
    assert Compose([steps[0], Compose(steps[1:])]) == Compose([Compose(steps[:2]), steps[2]])


# Inverse and equality


@any_exact
def test_a_view_and_its_inverse_are_the_identity(name):
    view = EXACT[name][0]
    assert Compose([view, view.inverse]) == Identity()
    assert Compose([view.inverse, view]) == Identity()


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5, 0.75, 1 / 3, 3.0, 1.1, (0.5, 2.0), (1.0, 0.7), (1.3, 1.0)], ids=str)
def test_inverse_of_a_scale(factor):
    view, images = Compose([Rotate90(), Scale(factor)]), noise(1, 1, 60, 120)
    assert view.inverse(view(images)).shape == images.shape
    odd = noise(1, 1, 7, 15)
    assert view.align(view(odd), (7, 15)).shape == odd.shape
    twice = view.inverse.inverse
    torch.testing.assert_close(twice(images), view(images), rtol=1e-5, atol=1e-5)


def test_a_scale_in_place_and_back_is_the_part_that_stayed():
    assert Compose([Scale(0.5, keep_size=True), Scale(2, keep_size=True)]) == Identity()
    images = noise(1, 2, 8, 12)
    back = Compose([Scale(2, keep_size=True), Scale(0.5, keep_size=True)])
    expected = torch.zeros_like(images)
    expected[..., 2:6, 3:9] = images[..., 2:6, 3:9]
    assert torch.equal(back(images), expected)
    assert torch.equal(back.valid((8, 12))[0], expected[0, 0] != 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
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
        (Crop(3, 5, 6, 8, image_size=SIZE), Crop(3, 5, 6, 8, size=(6, 8), image_size=SIZE, pad=True)),
        (Crop(3, 5, 6, 8, size=6, image_size=SIZE), Crop(3, 5, 6, 8, (6, 6), image_size=torch.Size(SIZE))),
        (Crop(3.0, 5, 6, torch.tensor(8), image_size=SIZE), Crop(3, 5, 6, 8, image_size=SIZE)),
        (
            Compose([Crop(1, 2, 9, 9, image_size=SIZE), Crop(2, 3, 5, 4, image_size=(9, 9))]),
            Crop(3, 5, 5, 4, image_size=SIZE),
        ),
        (
            Compose([HorizontalFlip(), Crop(3, 5, 6, 8, image_size=SIZE)]),
            Compose([Crop(3, 4, 6, 8, image_size=SIZE), HorizontalFlip()]),
        ),
        (
            Compose([Rotate90(), Crop(1, 2, 5, 6, image_size=(17, 12))]),
            Compose([Crop(2, 11, 6, 5, image_size=SIZE), Rotate90()]),
        ),
        (
            Compose([Crop(-1, -2, 14, 21, image_size=SIZE, pad=True), Crop(1, 2, 12, 17, image_size=(14, 21))]),
            Crop(0, 0, 12, 17, image_size=SIZE),
        ),
        (Crop(3, 5, 6, 8, size=(12, 16), image_size=SIZE), Compose([Crop(3, 5, 6, 8, image_size=SIZE), Scale(2)])),
        (Scale(0.5, keep_size=True).inverse, Scale(2, keep_size=True)),
        (Scale(1, keep_size=True), Identity()),
        (PerImage([Rotate90(2)]), Compose([HorizontalFlip(), VerticalFlip()])),
        (PerImage([Rotate90(), Identity()]).inverse, PerImage([Rotate90(3), Identity()])),
    ],
    ids=repr,
)
def test_views_that_do_the_same_are_equal_and_hash_alike(one, other):
    assert one == other
    assert hash(one) == hash(other)


def test_views_that_do_not_do_the_same_are_not_equal():
    distinct = [
        Identity(),
        Crop(3, 5, 6, 8, image_size=SIZE),
        Crop(3, 5, 6, 8, size=6, image_size=SIZE),
        Crop(3, 5, 6, 8, image_size=(12, 18)),
        Crop(4, 5, 6, 8, image_size=SIZE),
        Crop(0, 0, *SIZE, image_size=SIZE),  # which takes no other images, as Identity() does
        Compose([Crop(-1, 0, 13, 17, image_size=SIZE, pad=True), Crop(1, 0, 12, 17, image_size=(13, 17))]).inverse,
        Compose([Crop(0, 0, 11, 17, image_size=SIZE), Crop(0, 0, 12, 17, image_size=(11, 17), pad=True)]),
        HorizontalFlip(),
        VerticalFlip(),
        Rotate90(1),
        Rotate90(2),
        Rotate90(3),
        Scale(2),
        Scale((2, 1)),
        Scale(0.5),
        Scale(0.5, keep_size=True),
        PerImage([Identity(), Identity()]),
        PerImage([Identity(), HorizontalFlip()]),
    ]
    equal = [(a, b) for a, b in itertools.combinations(distinct, 2) if a == b]
    assert len(set(distinct)) == len(distinct) - len(equal)
    assert equal == [(distinct[5], distinct[6])]  # padded and cut back it is bound to the image, and all of it shows
