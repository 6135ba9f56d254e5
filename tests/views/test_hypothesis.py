"""Random compositions of views on random images: what holds for every one of them."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import (
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
    align_tokens,
)
from acr_reg.views.view import map_between
from tests.support.attention import generator
from tests.support.tensor_watch import TensorWatch

BATCH = 4
some = settings(max_examples=40, deadline=None, derandomize=True)


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator(0), dtype=dtype)


@dataclass(frozen=True)
class Case:
    """Steps, one after another, on images (BATCH, C, *size) with patches of ``patch`` pixels, and of ``patch_b`` on the
    output."""

    steps: list[View]
    size: tuple[int, int]
    patch: tuple[int, int]
    patch_b: tuple[int, int]

    @property
    def view(self):
        return Compose(self.steps)

    def images(self, channels=2, dtype=torch.float64):
        return noise(BATCH, channels, *self.size, dtype=dtype)

    def lattices(self):
        return [
            Lattice(size[0] // patch[0], size[1] // patch[1], (float(patch[0]), float(patch[1])))
            for size, patch in ((self.size, self.patch), (self.view.output_size(self.size), self.patch_b))
        ]


def whole_tokens(draw, size, patch, out=None, pad=False):
    """A crop of whole tokens, reaching beyond the image with ``pad``; ``out`` (height, width) in tokens."""
    box = []
    for axis in (0, 1):
        count = size[axis] // patch[axis]
        margin = 2 if pad else 0
        length = out[axis] if out else draw(st.integers(1, count + margin))
        low, high = (1 - length, count - 1) if pad else (0, count - length)
        box.append((draw(st.integers(low, high)) * patch[axis], length * patch[axis]))
    (top, height), (left, width) = box
    return Crop(top, left, height, width, image_size=size, pad=pad)


def anywhere(draw, size, out):
    """A crop of any pixels, resized."""
    height, width = (draw(st.integers(1, length)) for length in size)
    top, left = draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width))
    return Crop(top, left, height, width, size=out, image_size=size)


EXACT = ("flip", "turn", "crop", "pad")
RESAMPLED = ("anywhere", "scale", "in place")
FLIPS = [Identity(), HorizontalFlip(), VerticalFlip(), Rotate90(2)]


@st.composite
def cases(draw, kinds=EXACT + RESAMPLED, per_image=True, resampled=4):
    """1 to 4 steps, each for the size that the one before leaves, at most ``resampled`` of them no permutation. A scale
    of another size is by a whole factor, since two that round do not round as their product does."""
    patch = size_patch = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = start = tuple(draw(st.integers(1, 5)) * side for side in patch)
    steps, left = [], resampled
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from([kind for kind in kinds if kind in EXACT or left > 0]))
        left -= kind in RESAMPLED
        count = BATCH if per_image and draw(st.booleans()) else 1
        if kind == "flip":
            views = [draw(st.sampled_from(FLIPS)) for _ in range(count)]
        elif kind == "turn":
            turns = [draw(st.integers(-2, 5))] * count
            if size[0] == size[1] and patch[0] == patch[1]:
                turns = [draw(st.integers(-2, 5)) for _ in range(count)]
            views = [Rotate90(k) for k in turns]
        elif kind in ("crop", "pad"):
            first = whole_tokens(draw, size, patch, pad=kind == "pad")
            out = tuple(length // side for length, side in zip(first.fixed_size, patch, strict=True))
            views = [first] + [whole_tokens(draw, size, patch, out, kind == "pad") for _ in range(count - 1)]
        elif kind == "anywhere":
            out = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
            views = [anywhere(draw, size, out) for _ in range(count)]
        elif kind == "scale":
            views = [Scale(draw(st.sampled_from([2, 3, (1, 2)])))] * count
        else:
            views = [Scale(draw(st.sampled_from([0.5, 0.75, 1.3, (2, 0.6)])), keep_size=True) for _ in range(count)]
        steps.append(views[0] if count == 1 else PerImage(views))
        if steps[-1].affines[0].transposed:
            patch = patch[::-1]
        if kind in ("anywhere", "scale"):
            patch = (1, 1)
        size = steps[-1].output_size(size)
        if max(size) > 40:
            break
    return Case(steps, start, size_patch, patch)


# As algebra


@given(case=cases())
@some
def test_the_inverse_of_the_inverse_is_the_view(case):
    for view in (*case.steps, case.view):
        twice = view.inverse.inverse
        assert twice == view
        assert hash(twice) == hash(view)
        assert twice.affines == view.affines
        assert eval(repr(view)) == view
        assert eval(repr(view.inverse)) == view.inverse


@given(case=cases())
@some
def test_the_inverse_of_a_composition_is_that_of_its_steps_backwards(case):
    backwards = Compose([step.inverse for step in reversed(case.steps)])
    assert backwards.affines == case.view.inverse.affines


@given(case=cases())
@some
def test_composition_is_associative(case):
    for first, last in itertools.combinations(range(len(case.steps) + 1), 2):
        nested = Compose([*case.steps[:first], Compose(case.steps[first:last]), *case.steps[last:]])
        assert nested == case.view
        assert hash(nested) == hash(case.view)


@given(case=cases())
@some
def test_sizes_are_those_of_the_steps_one_after_another(case):
    size = case.size
    for step in case.steps:
        size = step.output_size(size)
    assert case.view.output_size(case.size) == size
    assert case.view.inverse.output_size(size) == case.size
    assert case.view(case.images()).shape == (BATCH, 2, *size)


@given(case=cases())
@some
def test_a_view_for_a_batch_holds_what_each_image_gets(case):
    each = [Compose([step.of_image(image) for step in case.steps]) for image in range(BATCH)]
    images = case.images()
    moved, valid = case.view(images), case.view.valid(case.size)
    for image in range(BATCH):
        assert case.view.of_image(image).affines == each[image].affines
        torch.testing.assert_close(moved[image], each[image](images[image : image + 1])[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(valid[image if len(valid) > 1 else 0], each[image].valid(case.size)[0])


# On images


@given(case=cases(EXACT))
@some
def test_exact_steps_are_the_sequence_to_the_bit_and_undo_themselves(case):
    images, valid = case.images(dtype=torch.float32), torch.ones(BATCH, *case.size, dtype=torch.bool)
    moved = images
    for step in case.steps:
        moved, valid = step(moved), step(valid[:, None])[:, 0]
    assert torch.equal(case.view(images), moved)
    assert torch.equal(case.view.valid(case.size).expand_as(valid), valid)
    back, shown = case.view.inverse(moved), case.view.inverse.valid(moved.shape[-2:])
    assert torch.equal(back, images.where(shown[:, None], torch.zeros(())))


@given(case=cases(("flip", "turn", *RESAMPLED), resampled=1))
@some
def test_with_one_resampling_it_is_the_sequence(case):
    images, valid = case.images(), torch.ones(BATCH, 1, *case.size, dtype=torch.float64)
    moved = images
    for step in case.steps:
        moved, valid = step(moved), step(valid)
    torch.testing.assert_close(case.view(images), moved, rtol=1e-9, atol=1e-9)
    assert torch.equal(case.view.valid(case.size).expand(BATCH, -1, -1), valid[:, 0] > 0.5)


@given(case=cases())
@some
def test_channels_are_viewed_each_by_itself(case):
    a, b = case.images(1), case.images(3).flip(0)
    together, apart = case.view(torch.cat([a, b], 1)), torch.cat([case.view(a), case.view(b)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


@given(case=cases(EXACT))
@some
def test_channels_are_moved_each_by_itself_to_the_bit(case):
    a, b = case.images(1), case.images(3).flip(0)
    assert torch.equal(case.view(torch.cat([a, b], 1)), torch.cat([case.view(a), case.view(b)], 1))


@given(case=cases(), factor=st.floats(-3, 3))
@some
def test_views_are_linear(case, factor):
    a, b = case.images(), case.images().flip(0, 1)
    expected = case.view(a) + factor * case.view(b)
    torch.testing.assert_close(case.view(a + factor * b), expected, rtol=1e-9, atol=1e-9)


@given(case=cases())
@some
def test_constants_stay_and_what_is_not_shown_is_zero(case):
    moved, valid = case.view(torch.full((BATCH, 1, *case.size), 3.0)), case.view.valid(case.size)[:, None]
    assert (moved.sub(3).abs() < 1e-5).logical_or(~valid).all()
    assert (moved == 0).logical_or(valid).all()
    assert case.view.shows_anything or not valid.any()


@given(case=cases())
@some
def test_the_weights_of_what_is_shown_sum_to_one(case):
    """By the gradient: what the view reads of the image is one for each pixel that it shows, and none negative."""
    images = case.images().requires_grad_()
    (grad,) = torch.autograd.grad(case.view(images).sum(), images)
    mass, count = grad.sum((-1, -2)), case.view.valid(case.size).sum((-1, -2))
    torch.testing.assert_close(mass, count[:, None].expand_as(mass).double(), rtol=1e-9, atol=1e-9)
    assert (grad >= 0).all()


# On tokens


def pooled(images, patch):
    """Patches summed; of whole numbers, hence to the bit."""
    return F.avg_pool2d(images, patch, divisor_override=1).flatten(-2)


@given(case=cases(EXACT))
@some
def test_tokens_move_as_the_pixels_beneath_them(case):
    images = case.images().mul(8).round()
    source, target = case.lattices()
    forward = map_between(case.view, source, target, "cpu")
    assert forward.is_exact
    assert torch.equal(forward.tokens(pooled(images, case.patch)), pooled(case.view(images), case.patch_b))
    pixels = pooled(case.view.valid(case.size)[:, None].double(), case.patch_b)[:, 0]
    assert torch.equal(forward.valid, pixels == case.patch_b[0] * case.patch_b[1])
    assert torch.equal(forward.valid, pixels > 0)


@given(case=cases(EXACT))
@some
def test_tokens_that_are_shown_round_trip_to_the_bit(case):
    source, target = case.lattices()
    forward, back = (
        map_between(case.view, source, target, "cpu"),
        map_between(case.view.inverse, target, source, "cpu"),
    )
    assert back.is_exact
    assert back.valid.sum(1).tolist() == forward.valid.sum(1).tolist()
    values = noise(BATCH, 2, len(source), 3, dtype=torch.float32)
    returned = back.tokens(forward.tokens(values, dim=2), dim=2)
    assert torch.equal(returned, values.where(back.valid[:, None, :, None], torch.zeros(())))
    moved = noise(BATCH, 2, len(target), 3, dtype=torch.float32)
    returned = forward.tokens(back.tokens(moved, dim=2), dim=2)
    assert torch.equal(returned, moved.where(forward.valid[:, None, :, None], torch.zeros(())))


@given(case=cases(), prefix=st.integers(0, 2))
@some
def test_resampled_tokens_are_the_map_of_their_grid(case, prefix):
    """Tokens along any dimension are a dense map, flattened, behind a prefix that stays."""
    source, target = (Lattice(*size) for size in (case.size, case.view.output_size(case.size)))
    maps = noise(BATCH, 2, len(source))
    expected = case.view(maps.reshape(BATCH, 2, *case.size)).flatten(-2)
    kept = noise(BATCH, 2, prefix)
    found = align_tokens(torch.cat([kept, maps], -1), case.view.inverse, source, target, prefix, dim=-1)
    torch.testing.assert_close(found, torch.cat([kept, expected], -1), rtol=1e-12, atol=1e-12)
    found = align_tokens(torch.cat([kept, maps], -1).mT, case.view.inverse, source, target, prefix)
    torch.testing.assert_close(found.mT, torch.cat([kept, expected], -1), rtol=1e-12, atol=1e-12)


def layouts_of(case, prefix):
    """Of the image's tokens and of the view's, each pixel a token."""
    lattices = [Lattice(*size) for size in (case.size, case.view.output_size(case.size))]
    return [TokenLayout(lattice, lattice, prefix) for lattice in lattices]


@given(case=cases(("flip", "turn", "crop", "anywhere", "scale"), resampled=1), prefix=st.integers(0, 2))
@some
def test_row_sums_are_carried_as_the_rows_are(case, prefix):
    """Where all that the view shows lies on the image, each row keeps its mass: summing over keys, then carrying."""
    image, view = layouts_of(case, prefix)
    maps = noise(BATCH, 2, view.num_queries, view.num_keys).softmax(-1)
    maps = maps * torch.rand(maps.shape[:-1], generator=generator(1), dtype=maps.dtype)[..., None]
    carried = align_attention(maps, case.view, view, image)
    sums = align_tokens(maps.sum(-1), case.view, view.query, image.query, prefix, dim=-1)
    seen = case.view.inverse.valid(case.view.output_size(case.size), case.size).flatten(1).any(1)
    seen = seen.expand(BATCH)  # a box too small to hold a centre of the image gives no row its mass
    torch.testing.assert_close(carried.sum(-1)[seen], sums[seen], rtol=1e-9, atol=1e-9)


@given(case=cases(("flip", "turn", "crop")), prefix=st.integers(0, 2))
@some
def test_attention_is_carried_as_two_maps_of_tokens(case, prefix):
    image, view = layouts_of(case, prefix)
    maps = noise(BATCH, 2, view.num_queries, view.num_keys, dtype=torch.float32).softmax(-1)
    columns = align_tokens(maps, case.view, view.key, image.key, prefix, dim=-1)
    expected = align_tokens(columns, case.view, view.query, image.query, prefix, dim=-2)
    assert torch.equal(align_attention(maps, case.view, view, image), expected)
    heads = torch.cat([maps, maps.flip(1)], 1)
    carried = align_attention(heads, case.view, view, image)
    assert torch.equal(carried, torch.cat([expected, expected.flip(1)], 1))


# Without an N x N index


WIDE = (48, 64)
EXACT_VIEWS = [
    HorizontalFlip(),
    Rotate90(),
    Crop(4, 8, 40, 52, image_size=WIDE),
    Crop(-4, 8, 40, 60, image_size=WIDE, pad=True),
    PerImage(FLIPS),
    Compose([PerImage(FLIPS), Crop(4, 8, 40, 52, image_size=WIDE), Rotate90()]),
    PerImage([Crop(k, 0, 40, 40, image_size=WIDE) for k in range(3)] + [Crop(3, 9, 40, 40, image_size=WIDE)]),
]


@pytest.mark.parametrize("view", EXACT_VIEWS, ids=repr)
def test_an_exact_map_makes_nothing_of_n_x_n(view):
    source, target = Lattice(*WIDE), Lattice(*view.output_size(WIDE))
    values = torch.zeros(BATCH, 2, len(source))
    map_between.cache_clear()
    with TensorWatch() as made:
        moved = map_between(view, source, target, "cpu").tokens(values)
    assert moved.shape == (BATCH, 2, len(target))
    assert len(target) <= made.largest <= values.numel()
    with TensorWatch() as made:
        view(values.reshape(BATCH, 2, *WIDE))
    assert made.largest <= values.numel()


@pytest.mark.parametrize("view", [Scale(0.5), Crop(3, 5, 31, 40, size=(24, 40), image_size=WIDE)], ids=repr)
def test_a_resampling_makes_nothing_of_n_x_n_either(view):
    source, target = Lattice(*WIDE), Lattice(*view.output_size(WIDE))
    values = torch.zeros(BATCH, 2, len(source))
    map_between.cache_clear()
    with TensorWatch() as made:
        map_between(view, source, target, "cpu").tokens(values)
    assert made.largest <= values.numel()


def test_largest_sees_an_n_x_n_index():
    """The measure of the tests above."""
    with TensorWatch() as made:
        torch.arange(64)[:, None] + torch.arange(64)
    assert made.largest == 64 * 64
