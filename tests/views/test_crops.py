"""Crops, scales in place and views of each image, against torchvision, against loops over images and pixels, and as
algebra."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as TF

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
)
from acr_reg.views.view import map_between
from tests.support.attention import explicit, generator, says
from tests.support.oracles import filter_row
from tests.support.pairs import aligned_rows

SIZE = (12, 17)
BOXES = {
    "inside": (3, 5, 6, 8),
    "top left": (0, 0, 5, 7),
    "bottom right": (4, 9, 8, 8),
    "one row": (6, 2, 1, 9),
    "one column": (2, 16, 7, 1),
    "one pixel": (11, 16, 1, 1),
    "whole": (0, 0, 12, 17),
}
BEYOND = {
    "all around": (-2, -3, 17, 24),
    "top left": (-4, -5, 9, 11),
    "bottom right": (8, 12, 9, 9),
    "a corner pixel": (-3, 16, 4, 5),
    "inside": (1, 2, 3, 4),
}
any_box = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
any_box_beyond = pytest.mark.parametrize("box", BEYOND.values(), ids=BEYOND)
# One pixel wide outputs are left to the loop: torch 2.14 on a CPU is wrong for those (see test_views.py).
SIZES = [(6, 6), (12, 16), (3, 5), (25, 4), (7, 40), (1, 2)]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def resampled_by_loop(image, size, place, reach, shown):
    """One image (H, W) read pixel by pixel: ``place(i, j)`` is where pixel (i, j) of the output looks, in pixels from
    the image's corner, ``shown`` the (first, last) pixels along each axis that may be read."""
    (top, bottom), (left, right) = shown
    part = image[top : bottom + 1, left : right + 1]
    output, valid = torch.zeros(size, dtype=image.dtype), torch.zeros(size, dtype=torch.bool)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        y, x = place(i, j)
        valid[i, j] = top <= y <= bottom + 1 and left <= x <= right + 1
        if valid[i, j]:
            along_y = torch.tensor(filter_row(y - top - 0.5, reach[0], part.shape[0]), dtype=image.dtype)
            along_x = torch.tensor(filter_row(x - left - 0.5, reach[1], part.shape[1]), dtype=image.dtype)
            output[i, j] = along_y @ part @ along_x
    return output, valid


def crop_by_loop(image, box, size):
    """A box of one image (H, W), which may reach beyond it, resized to ``size``: (output, valid)."""
    top, left, height, width = box
    rows, columns = image.shape
    return resampled_by_loop(
        image,
        size,
        lambda i, j: (top + (i + 0.5) * height / size[0], left + (j + 0.5) * width / size[1]),
        (height / size[0], width / size[1]),
        (
            (max(top, 0), min(top + height, rows) - 1),
            (max(left, 0), min(left + width, columns) - 1),
        ),
    )


# Crops against torchvision


@any_box
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.bool, torch.int64])
def test_a_crop_is_torchvisions_to_the_bit(box, dtype):
    images = (10 * noise(2, 3, *SIZE)).to(dtype)
    view = Crop(*box, image_size=SIZE)
    assert torch.equal(view(images), TF.crop(images, *box))
    assert view(images).dtype == dtype
    assert view.output_size(SIZE) == box[2:]
    assert view.valid(SIZE).all()


@any_box_beyond
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_a_padded_crop_is_torchvisions_with_zeros_beyond(box, dtype):
    images = (10 * noise(2, 3, *SIZE)).to(dtype)
    view = Crop(*box, image_size=SIZE, pad=True)
    assert torch.equal(view(images), TF.crop(images, *box))  # which fills with zeros
    assert torch.equal(view.valid(SIZE)[0], TF.crop(torch.ones(1, *SIZE, dtype=torch.bool), *box)[0])


def test_padding_alone_is_torchvisions_pad():
    images = noise(2, 3, *SIZE)
    left, top, right, bottom = 3, 1, 4, 2
    view = Crop(-top, -left, SIZE[0] + top + bottom, SIZE[1] + left + right, image_size=SIZE, pad=True)
    assert torch.equal(view(images), TF.pad(images, [left, top, right, bottom]))
    assert torch.equal(view.inverse(view(images)), images)


@any_box
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resized_crop_is_torchvisions(box, size, dtype):
    images = noise(2, 3, *SIZE, dtype=dtype)
    view = Crop(*box, size=size, image_size=SIZE)
    assert view.output_size(SIZE) == size
    expected = TF.resized_crop(images, *box, list(size), antialias=True)
    torch.testing.assert_close(view(images), expected, rtol=1e-5, atol=1e-5)
    assert view.valid(SIZE).all()


def test_what_get_params_returns_is_what_the_transform_does():
    images = torch.rand(2, 3, 40, 56, generator=generator(0))
    for seed in range(20):
        torch.manual_seed(seed)
        box = T.RandomResizedCrop.get_params(images, [0.08, 1.0], [3 / 4, 4 / 3])
        view = Crop(*box, size=24, image_size=images.shape[-2:])
        torch.manual_seed(seed)
        expected = T.RandomResizedCrop(24, antialias=True)(images)
        torch.testing.assert_close(view(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 9), (6, 8), (9, 5)], ids=str)
@pytest.mark.parametrize("box", [*BOXES.values(), *BEYOND.values()], ids=str)
def test_a_crop_is_a_loop_over_pixels(box, size):
    image = noise(*SIZE, dtype=torch.float64)
    view = Crop(*box, size=size, image_size=SIZE, pad=True)
    expected, valid = crop_by_loop(image, box, size)
    assert torch.equal(view.valid(SIZE)[0], valid)
    assert valid.any() or size[0] * size[1] < 48
    torch.testing.assert_close(view(image), expected, rtol=1e-9, atol=1e-9)


def test_one_pixel_enlarged_is_that_pixel():
    images = noise(1, 2, *SIZE)
    view = Crop(11, 16, 1, 1, size=(5, 3), image_size=SIZE)
    torch.testing.assert_close(view(images), images[..., 11:, 16:].expand(1, 2, 5, 3), rtol=0, atol=1e-6)


def test_a_crop_reads_nothing_beyond_its_box():
    """As the transform, which crops before it resizes: what lies beside the box does not bleed in."""
    images = torch.full((1, 1, *SIZE), 1e6)
    images[..., 3:9, 5:13] = 1.0
    for size in SIZES:
        assert Crop(3, 5, 6, 8, size=size, image_size=SIZE)(images).sub(1).abs().max() < 1e-5


# Scale in place


@pytest.mark.parametrize(
    ("factor", "size", "box"),
    [
        (2, (16, 16), (4, 4, 8, 8)),
        (1.5, (12, 18), (2, 3, 8, 12)),
        (3.0, (12, 6), (4, 2, 4, 2)),
        ((2, 1.25), (16, 20), (4, 2, 8, 16)),
    ],
    ids=str,
)
def test_an_enlargement_in_place_is_the_middle_resized(factor, size, box):
    """Of the middle alone: what is cut off is not read."""
    images = noise(2, 3, *size, dtype=torch.float64)
    view = Scale(factor, keep_size=True)
    assert view.output_size(size) == size
    assert view.valid(size).all()
    torch.testing.assert_close(view(images), TF.resized_crop(images, *box, list(size)), rtol=1e-5, atol=1e-5)


def partly_shown(pixels, factor):
    """The first and the last pixel of which an enlargement in place shows at least a part."""
    margin = max(0.0, pixels / 2 * (1 - 1 / factor))
    return math.floor(margin + 1e-3), math.ceil(pixels - margin - 1e-3) - 1


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (5, 7)], ids=str)
@pytest.mark.parametrize("factor", [0.5, 0.7, 1.4, (0.4, 1.0), (1.5, 0.6)], ids=str)
def test_a_scale_in_place_is_a_loop_over_pixels(factor, size):
    fy, fx = factor if isinstance(factor, tuple) else (factor, factor)
    (rows, columns), image = size, noise(*size, dtype=torch.float64)
    expected, valid = resampled_by_loop(
        image,
        size,
        lambda i, j: (rows / 2 + (i + 0.5 - rows / 2) / fy, columns / 2 + (j + 0.5 - columns / 2) / fx),
        (1 / fy, 1 / fx),
        (partly_shown(rows, fy), partly_shown(columns, fx)),
    )
    view = Scale(factor, keep_size=True)
    assert torch.equal(view.valid(size)[0], valid)
    assert valid.any()
    torch.testing.assert_close(view(image), expected, rtol=1e-9, atol=1e-9)


def test_a_scale_in_place_and_back_is_the_part_that_stayed():
    assert Compose([Scale(0.5, keep_size=True), Scale(2, keep_size=True)]) == Identity()
    images = noise(1, 2, 8, 12)
    back = Compose([Scale(2, keep_size=True), Scale(0.5, keep_size=True)])
    expected = torch.zeros_like(images)
    expected[..., 2:6, 3:9] = images[..., 2:6, 3:9]
    assert torch.equal(back(images), expected)
    assert torch.equal(back.valid((8, 12))[0], expected[0, 0] != 0)


# A view of each image

CROPS = [
    Crop(0, 0, 6, 6, size=6, image_size=(12, 16)),
    Crop(3, 5, 6, 9, size=6, image_size=(12, 16)),
    Compose([Rotate90(), Crop(4, 1, 8, 7, size=6, image_size=(16, 12))]),
    Compose([Crop(-2, -3, 14, 14, size=6, image_size=(12, 16), pad=True), Rotate90(3), HorizontalFlip()]),
]
EXACT_CROPS = [
    Crop(0, 0, 6, 6, image_size=(12, 16)),
    Compose([Crop(4, 9, 6, 6, image_size=(12, 16)), HorizontalFlip()]),
    Compose([Rotate90(), Crop(7, 1, 6, 6, image_size=(16, 12))]),
    Compose([Crop(-2, 13, 6, 6, image_size=(12, 16), pad=True), Rotate90(3), VerticalFlip()]),
]


def by_loop(views, maps):
    return torch.stack([view(image[None])[0] for view, image in zip(views, maps, strict=True)])


@pytest.mark.parametrize("views", [CROPS, EXACT_CROPS], ids=["resized", "exact"])
@pytest.mark.parametrize("divide", [1, 2, 4], ids="1/{}".format)
def test_a_view_of_each_image_is_a_loop_over_images(views, divide):
    """On images, and on dense maps of a lower resolution."""
    maps = noise(4, 3, 12 // divide, 16 // divide, dtype=torch.float64)
    view = PerImage(views)
    assert view.num_images == 4
    torch.testing.assert_close(view(maps), by_loop(views, maps), rtol=1e-12, atol=1e-12)
    valid = torch.cat([one.valid(maps.shape[-2:]) for one in views])
    assert torch.equal(view.valid(maps.shape[-2:]), valid)
    assert divide == 4 or not valid.all()
    there = view(maps)
    back = torch.stack([one.align(m[None], maps.shape[-2:])[0] for one, m in zip(views, there, strict=True)])
    torch.testing.assert_close(view.align(there, maps.shape[-2:]), back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float32])
def test_exact_views_of_each_image_are_a_loop_to_the_bit(dtype):
    maps = (10 * noise(4, 3, 12, 16)).to(dtype)
    view = PerImage(EXACT_CROPS)
    assert torch.equal(view(maps), by_loop(EXACT_CROPS, maps))
    square = (10 * noise(4, 3, 7, 7)).to(dtype)
    moves = [Rotate90(), Identity(), HorizontalFlip(), Compose([Rotate90(3), VerticalFlip()])]
    moved = PerImage(moves)(square)
    assert torch.equal(moved, by_loop(moves, square))
    assert torch.equal(PerImage(moves).inverse(moved), square)


def test_the_shape_of_the_rest_is_free():
    views = PerImage([HorizontalFlip(), Identity(), Scale(0.5, keep_size=True)])
    for shape in [(3, 8, 8), (3, 1, 8, 8), (3, 2, 2, 8, 8)]:
        maps = noise(*shape, dtype=torch.float64)
        moved = views(maps)
        assert moved.shape == maps.shape
        for image in range(3):
            torch.testing.assert_close(moved[image], views.of_image(image)(maps[image]), rtol=1e-12, atol=1e-12)


def test_maps_without_channels_or_images():
    views = PerImage([Crop(0, 0, 4, 6, size=3, image_size=(8, 8)), Crop(1, 2, 5, 5, size=3, image_size=(8, 8))])
    assert views(torch.zeros(2, 0, 8, 8)).shape == (2, 0, 3, 3)
    assert Crop(0, 0, 4, 6, size=3, image_size=(8, 8))(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 3, 3)
    assert Crop(0, 0, 4, 6, image_size=(8, 8))(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 4, 6)


def test_one_view_for_one_image_serves_any_batch():
    one = PerImage([CROPS[1]])
    assert one == CROPS[1]
    for batch in (1, 3):
        images = noise(batch, 2, 12, 16)
        assert torch.equal(one(images), CROPS[1](images))


def test_gradient_flows_through_views_of_each_image():
    maps = noise(4, 1, 12, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(PerImage(CROPS), (maps,), fast_mode=True)
    assert torch.autograd.gradcheck(PerImage(EXACT_CROPS), (maps,), fast_mode=True)
    (grad,) = torch.autograd.grad(PerImage(EXACT_CROPS)(maps).sum(), maps)
    for image, view in enumerate(EXACT_CROPS):
        assert torch.equal(grad[image, 0] != 0, view.inverse.valid((6, 6))[0])


def test_an_image_turned_by_another_amount_needs_squares():
    view = PerImage([Rotate90(), Identity()])
    with pytest.raises(ValueError, match="one output size") as error:
        view(noise(2, 1, 4, 6))
    assert says(error, "4 x 6", "6 x 4", "PerImage([Rotate90(1), Identity()])", "Crop(")


def test_views_of_each_image_are_for_as_many():
    view = PerImage([HorizontalFlip(), Identity(), VerticalFlip()])
    for maps, found in [(noise(2, 1, 4, 4), 2), (noise(4, 4), 1), (noise(1, 3, 4, 4), 1)]:
        with pytest.raises(ValueError, match="3 images") as error:
            view(maps)
        assert says(error, "PerImage([", f"a batch of {found}")
    with pytest.raises(ValueError, match="2 images") as error:
        Compose([view, PerImage([Identity(), Identity()])])
    assert says(error, "for 2 images", "a batch of 3")


@pytest.mark.parametrize(
    ("views", "numbers"),
    [
        ([Scale(2), Scale(3)], ("(2, 2)", "(3, 3)", "keep_size=True")),
        (
            [Crop(0, 0, 4, 4, image_size=(8, 8)), Crop(0, 0, 4, 5, image_size=(8, 8))],
            ("4 x 4", "4 x 5"),
        ),
        ([Crop(0, 0, 4, 4, image_size=(8, 8)), Identity()], ("4 x 4", "8 x 8")),
        ([Identity(), Crop(0, 0, 4, 4, image_size=(8, 8)), Crop(0, 0, 5, 5, image_size=(8, 8))], ("4 x 4", "5 x 5")),
    ],
    ids=["scales", "sizes", "a crop and none", "two crops and none"],
)
def test_views_of_each_image_give_one_size(views, numbers):
    with pytest.raises(ValueError, match="one ") as error:
        PerImage(views)
    assert says(error, *numbers)


def test_images_of_several_sizes_are_cropped_to_one_batch():
    """Where a loader crops each image before they are stacked, two such batches are still views of each other."""
    sizes = [(16, 16), (16, 32)]
    first = PerImage([Crop(0, 2, 8, 8, image_size=size) for size in sizes])
    second = PerImage([Crop(4, 6, 8, 8, image_size=size) for size in sizes])
    images = [noise(1, 1, *size) for size in sizes]
    a, b = (torch.cat([view.of_image(i)(image) for i, image in enumerate(images)]) for view in (first, second))
    relation = Compose([first.inverse, second])
    shown = relation.valid((8, 8))[:, None]
    assert shown.sum() == 2 * 4 * 4
    assert torch.equal(relation(a), b * shown)
    with pytest.raises(ValueError, match="one output size"):
        first(torch.cat([images[0], images[0]]))


def test_views_of_each_image_are_views_of_one():
    for views, found in [([], "0 views"), ([Identity(), PerImage([Identity(), Identity()])], "[1, 2]")]:
        with pytest.raises(ValueError, match="one view for each") as error:
            PerImage(views)
        assert says(error, found)
    with pytest.raises(TypeError, match="sequence") as error:
        PerImage(Identity())
    assert says(error, "PerImage([")
    with pytest.raises(TypeError, match="str") as error:
        PerImage([Identity(), "flip"])
    assert says(error, "HorizontalFlip()")


def test_scaled_to_different_sizes_and_cropped_to_one_they_are_one_batch():
    """Hosts scale each image by another factor and crop or pad to one size; scaled sizes are rounded."""
    images = noise(2, 3, 33, 33)
    views = [
        Compose([Scale(0.75), Crop(1, 2, 20, 20, size=16, image_size=(25, 25))]),
        Compose([Scale(1.3), Crop(3, 4, 30, 33, size=16, image_size=(43, 43))]),
    ]
    for view in views:
        assert view.output_size((33, 33)) == (16, 16)
    torch.testing.assert_close(PerImage(views)(images), by_loop(views, images), rtol=1e-5, atol=1e-5)


# Validity and alignment


@pytest.mark.parametrize("box", [*BOXES.values(), *BEYOND.values()], ids=str)
@pytest.mark.parametrize("size", [None, (5, 9)], ids=str)
def test_what_a_view_shows_of_the_image_is_a_loop_over_centres(box, size):
    top, left, height, width = box
    view = Crop(*box, size=size, image_size=SIZE, pad=True)
    found = view.inverse.valid(view.output_size(SIZE), SIZE)[0]
    for i, j in itertools.product(range(SIZE[0]), range(SIZE[1])):
        assert found[i, j] == (top <= i + 0.5 <= top + height and left <= j + 0.5 <= left + width)
    assert found.any()


@any_box_beyond
@pytest.mark.parametrize("move", [Identity(), HorizontalFlip(), Rotate90(), Rotate90(3)], ids=repr)
def test_zeros_stand_where_a_view_shows_nothing(box, move):
    view = Compose([Crop(*box, size=(7, 9), image_size=SIZE, pad=True), move])
    images = torch.full((1, 2, *SIZE), torch.nan)  # nothing of it may leak, not even by a product with 0
    moved, valid = view(images), view.valid(SIZE)[0]
    assert (moved[..., ~valid] == 0).all()
    assert torch.isnan(moved[..., valid]).all()


@any_box
def test_align_puts_a_crop_back_where_it_was(box):
    top, left, height, width = box
    images = noise(2, 3, *SIZE)
    view = Crop(*box, image_size=SIZE)
    expected = torch.zeros_like(images)
    inside = (..., slice(top, top + height), slice(left, left + width))
    expected[inside] = images[inside]
    assert torch.equal(view.align(view(images), SIZE), expected)
    assert torch.equal(view.inverse(view(images)), expected)


def test_align_puts_a_resized_crop_back_where_it_was():
    """A ramp is what bilinear filters leave as it is, away from the edges of the box."""
    ramp = torch.arange(24.0)[:, None] + 100 * torch.arange(32.0)
    view = Crop(4, 8, 12, 16, size=(24, 48), image_size=(24, 32))
    back = view.align(view(ramp[None]), (24, 32))[0]
    torch.testing.assert_close(back[5:15, 9:23], ramp[5:15, 9:23], rtol=1e-4, atol=1e-2)
    assert (back[:4] == 0).all()
    assert (back[:, 24:] == 0).all()
    assert (back[4:16, 8:24] != 0).all()


def test_maps_of_a_view_are_carried_onto_the_tokens_of_the_image():
    """A map at 1/4 of the view's resolution, back at 1/4 of the image's."""
    view = Crop(8, 4, 16, 24, image_size=(32, 40))
    maps = noise(1, 2, 4, 6)
    expected = torch.zeros(1, 2, 8, 10)
    expected[..., 2:6, 1:7] = maps
    assert torch.equal(view.align(maps, (8, 10)), expected)


# Composition

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


# As values

KINDS = [
    *[Crop(*box, image_size=SIZE) for box in BOXES.values()],
    *[Crop(*box, size=(7, 10), image_size=SIZE) for box in BOXES.values()],
    *[Crop(*box, size=8, image_size=SIZE, pad=True) for box in BEYOND.values()],
    Scale(0.7, keep_size=True),
    Scale((1.3, 0.6), keep_size=True),
    PerImage(CROPS),
    PerImage(EXACT_CROPS),
    PerImage(CROPS).of_image(2),
    Compose([PerImage(CROPS), Rotate90(), Scale(1.5)]),
    Compose([Rotate90(), Crop(1, 2, 9, 7, size=(13, 8), image_size=(17, 12)), Scale(0.3, keep_size=True)]),
    Compose([Scale(0.37), HorizontalFlip(), Scale(1.9)]),
]
any_kind = pytest.mark.parametrize("view", KINDS, ids=repr)


@any_kind
def test_inverse_of_the_inverse_is_the_view(view):
    twice = view.inverse.inverse
    assert twice == view
    assert hash(twice) == hash(view)
    assert repr(twice) == repr(view)
    assert view.inverse.inverse.inverse == view.inverse
    assert (view.inverse.input_size, view.inverse.fixed_size) == (view.fixed_size, view.input_size)


@any_kind
def test_views_are_printed_as_they_are_written(view):
    for one in (view, view.inverse):
        again = eval(repr(one))
        assert isinstance(again, View)
        assert again == one
        assert repr(again) == repr(one)


@any_kind
def test_views_are_copied_and_pickled(view):
    for one in (view, view.inverse):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
            assert other == one
            assert hash(other) == hash(one)
            assert other.inverse == one.inverse
            assert repr(other) == repr(one)


def test_views_that_do_the_same_are_equal_and_hash_alike():
    around = Crop(-1, -2, 14, 21, image_size=SIZE, pad=True)
    same = [
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
        (Compose([around, Crop(1, 2, 12, 17, image_size=(14, 21))]), Crop(0, 0, 12, 17, image_size=SIZE)),
        (Crop(3, 5, 6, 8, size=(12, 16), image_size=SIZE), Compose([Crop(3, 5, 6, 8, image_size=SIZE), Scale(2)])),
        (Scale(0.5, keep_size=True).inverse, Scale(2, keep_size=True)),
        (Scale(1, keep_size=True), Identity()),
        (PerImage([Rotate90(2)]), Compose([HorizontalFlip(), VerticalFlip()])),
        (PerImage([Rotate90(), Identity()]).inverse, PerImage([Rotate90(3), Identity()])),
    ]
    for one, other in same:
        assert one == other, (one, other)
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
        Scale(0.5),
        Scale(0.5, keep_size=True),
        PerImage([Identity(), Identity()]),
        PerImage([Identity(), HorizontalFlip()]),
    ]
    equal = [(a, b) for a, b in itertools.combinations(distinct, 2) if a == b]
    assert equal == [(distinct[5], distinct[6])]  # padded and cut back it is bound to the image, and all of it shows


@pytest.mark.parametrize("name", ["affines", "input_size", "fixed_size", "label"])
def test_views_are_immutable(name):
    with pytest.raises(AttributeError):
        setattr(KINDS[0], name, ())


# Bound to a size


def test_a_crop_takes_no_images_of_another_size():
    view = Crop(0, 16, 32, 32, size=64, image_size=(48, 64))
    for size in [(48, 65), (47, 64), (96, 128), (64, 48), (40, 60)]:
        with pytest.raises(ValueError, match="48 x 64") as error:
            view(noise(1, 1, *size))
        assert says(error, repr(view), f"{size[0]} x {size[1]}", "input")
        with pytest.raises(ValueError, match="48 x 64"):
            view.valid(size)
        with pytest.raises(ValueError, match="48 x 64"):
            view(noise(1, 1, *size), (5, 5))
    for size in [(65, 64), (50, 50), (128, 128)]:
        with pytest.raises(ValueError, match="64 x 64") as error:
            view.align(noise(1, 1, *size), (48, 64))
        assert says(error, "inverse", f"{size[0]} x {size[1]}")


@pytest.mark.parametrize("by", [2, 4, 8, 16])
def test_a_crop_takes_maps_at_a_whole_fraction(by):
    view = Crop(0, 16, 32, 32, size=64, image_size=(48, 64))
    maps = noise(1, 2, 48 // by, 64 // by, dtype=torch.float64)
    assert view.output_size(maps.shape[-2:]) == (64 // by, 64 // by)
    expected = TF.resized_crop(maps, 0, 16 // by, 32 // by, 32 // by, [64 // by, 64 // by], antialias=True)
    torch.testing.assert_close(view(maps), expected, rtol=1e-9, atol=1e-9)


def test_a_crop_of_few_pixels_is_as_small_on_a_map():
    """Half the resolution of a box of 2 x 2 pixels is 1 x 1, however near that is to the size in pixels."""
    view = Crop(2, 4, 2, 2, image_size=(8, 8))
    maps = noise(1, 1, 4, 4)
    assert view.output_size((4, 4)) == (1, 1)
    assert torch.equal(view(maps), maps[..., 1:2, 2:3])


def tokens_of(size, patch=16, batch=1):
    """One layer's attention of images that the patch need not divide: what does not fill one is left out."""
    lattice = Lattice(size[0] // patch, size[1] // patch, (float(patch),) * 2, extent=tuple(map(float, size)))
    tokens = 1 + len(lattice)
    return explicit(torch.full((batch, 1, tokens, tokens), 1 / tokens), TokenLayout(lattice, lattice, 1, (0,)))


@pytest.mark.parametrize(("size", "out"), [((255, 255), 448), ((60, 60), 224), ((96, 111), 448)], ids=str)
def test_an_image_that_the_patch_does_not_divide_may_be_cropped_to_one_that_it_does(size, out):
    """15 tokens of 16 px on 255 px, and 28 on the 448 px that the image is resized to: 15 * 448 / 255 are but 26."""
    view = Crop(0, 0, *size, size=out, image_size=size)
    _, patches = aligned_rows(tokens_of(size), tokens_of((out, out)), view)
    assert patches.b.shape == patches.a.shape


def test_images_that_the_patch_does_not_divide_may_be_turned_each_by_itself():
    views = [
        Crop(0, 0, 239, 224, size=224, image_size=(239, 224)),
        Compose([Rotate90(), Crop(0, 0, 224, 239, size=224, image_size=(224, 239))]),
    ]
    _, patches = aligned_rows(tokens_of((239, 224), batch=2), tokens_of((224, 224), batch=2), PerImage(views))
    assert patches.b.shape == patches.a.shape


# Bad input


@pytest.mark.parametrize(
    ("box", "size", "numbers"),
    [
        ((-1, 0, 4, 4), None, ("(-1, 0)", "rows -1 to 3", "columns 0 to 4", "pad=True")),
        ((9, 0, 4, 4), None, ("(9, 0)", "rows 9 to 13", "pad=True")),
        ((0, 14, 4, 4), None, ("(0, 14)", "columns 14 to 18", "pad=True")),
        ((0, 0, 13, 18), None, ("13 x 18", "rows 0 to 13", "columns 0 to 18")),
        ((0, 0, 0, 4), 6, ("0 x 4", "6 x 6", "at least 1")),
        ((0, 0, 4, -4), 6, ("4 x -4", "at least 1")),
        ((0, 0, 4, 4), 0, ("resized to 0 x 0",)),
        ((0, 0, 4, 4), (3, -1), ("resized to 3 x -1",)),
    ],
    ids=str,
)
def test_boxes_outside_the_image(box, size, numbers):
    with pytest.raises(ValueError, match="box") as error:
        Crop(*box, size=size, image_size=SIZE)
    assert says(error, "12 x 17", *numbers)


@pytest.mark.parametrize("box", [(-4, 0, 4, 4), (12, 0, 4, 4), (0, 17, 4, 4), (0, -9, 4, 9)], ids=str)
def test_boxes_that_touch_nothing_of_the_image(box):
    with pytest.raises(ValueError, match="box") as error:
        Crop(*box, image_size=SIZE, pad=True)
    assert says(error, f"({box[0]}, {box[1]})", "12 x 17", "move")
    assert "pad=True" not in str(error.value)


@pytest.mark.parametrize("image_size", [(0, 8), (8, 0), (-2, 8)], ids=str)
@pytest.mark.parametrize("pad", [False, True])
def test_an_image_has_pixels(image_size, pad):
    with pytest.raises(ValueError, match=f"{image_size[0]} x {image_size[1]}") as error:
        Crop(-3, -3, 16, 16, image_size=image_size, pad=pad)
    assert says(error, "at least 1")


@pytest.mark.parametrize("value", [1.5, True, float("nan"), float("inf"), None, "2px"], ids=str)
def test_boxes_are_whole_pixels(value):
    for arguments in [
        {"top": value},
        {"width": value},
        {"size": (4, value)},
        {"image_size": (12, value)},
    ]:
        given = {"top": 0, "left": 0, "height": 4, "width": 4, "image_size": SIZE, **arguments}
        with pytest.raises(TypeError, match="whole pixels") as error:
            Crop(**given)
        assert says(error, repr(value))


@pytest.mark.parametrize("given", [{"size": (4, 4, 4)}, {"image_size": (3, 12, 17)}, {"image_size": 12}], ids=str)
def test_sizes_are_height_and_width(given):
    with pytest.raises((TypeError, ValueError), match="found") as error:
        Crop(0, 0, 4, 4, **{"image_size": SIZE, **given})
    assert says(error, "height", "width")


@pytest.mark.parametrize("factor", [0, -0.5, float("nan"), float("inf"), (1, 0), (1, 2, 3)], ids=str)
def test_scales_in_place_that_are_none(factor):
    with pytest.raises(ValueError, match="scale of") as error:
        Scale(factor, keep_size=True)
    assert says(error, str(factor), "positive")


def test_resampling_integers_is_refused_of_a_batch_where_one_resamples():
    view = PerImage([Crop(0, 0, 4, 4, image_size=(8, 8)), Crop(0, 0, 5, 5, size=4, image_size=(8, 8))])
    with pytest.raises(TypeError, match="uint8") as error:
        view(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert says(error, "(2, 3, 8, 8)", "PerImage([", ".float()")


def test_a_map_too_small_for_a_crop():
    view = Crop(0, 0, 8, 8, image_size=(64, 64))
    with pytest.raises(ValueError, match="leaves 0 x 0") as error:
        view(noise(1, 1, 2, 2))
    assert says(error, "2 x 2", "at least 1 x 1")


def test_long_views_are_cut_in_messages():
    view = PerImage(CROPS * 8)
    with pytest.raises(ValueError, match="32 images") as error:
        view(noise(5, 1, 12, 16))
    assert says(error, "PerImage([Crop(0, 0, 6, 6", "...", "a batch of 5")
    assert len(str(error.value)) < 400


def test_maps_of_views_are_kept_by_what_the_views_do():
    """Two equal views have one map."""
    lattices = (Lattice(3, 4, (4.0, 4.0)), Lattice(2, 2, (4.0, 4.0)))
    made = [map_between(Crop(4, 8, 8, 8, (8, 8), image_size=(12, 16)), *lattices, "cpu") for _ in range(2)]
    assert made[0] is made[1]
