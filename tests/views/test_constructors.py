"""What each constructor makes: crops and scales against torchvision and a loop over pixels, views of each image against
a loop over images."""

import itertools
import math

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from acr_reg import Compose, Crop, HorizontalFlip, Identity, PerImage, Rotate90, Scale, VerticalFlip
from tests.support.attention import generator, says
from tests.support.oracles import filter_row
from tests.support.views import (
    BEYOND,
    BOXES,
    CROPS,
    EXACT,
    EXACT_CROPS,
    SIZE,
    any_box,
    any_box_beyond,
    interpolate,
    noise,
    ramp,
)

# One pixel wide outputs are left to the loop: torch 2.14 on a CPU is wrong for those (see interpolate).
SIZES = [(6, 6), (12, 16), (3, 5), (25, 4), (7, 40), (1, 2)]
FACTORS = [2.0, 0.5, 1.5, 0.75, 1 / 3, 3.0, 1.1, (0.5, 2.0), (1.0, 0.7), (1.3, 1.0)]


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


# Scale


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (12, 8), (15, 32), (3, 40)], ids=str)
def test_scale_is_bilinear_interpolation(factor, size):
    view, images = Scale(factor), noise(2, 3, *size, dtype=torch.float64)
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    target = tuple(round(s * f) for s, f in zip(size, factors, strict=True))
    assert view.output_size(size) == target
    torch.testing.assert_close(view(images), interpolate(images, target), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(view(images.float()), interpolate(images, target).float(), rtol=1e-4, atol=1e-5)


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


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=9), factor=st.floats(0.3, 4))
@settings(max_examples=60, deadline=None)
def test_a_resampling_stays_within_the_range_of_its_source(values, factor):
    row = torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1).expand(1, 1, 4, -1)
    scaled = Scale(factor)(row)
    assert scaled.min() >= row.min() - 1e-9
    assert scaled.max() <= row.max() + 1e-9


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


# A view of each image


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


def test_one_image_that_resamples_makes_no_other_inexact():
    """Exact images of such a batch are read by weights, to rounding."""
    images = noise(2, 3, 12, 16, dtype=torch.float32)
    exact, resized = Crop(2, 3, 6, 6, image_size=(12, 16)), Crop(2, 3, 7, 8, size=6, image_size=(12, 16))
    together = PerImage([exact, resized])(images)
    torch.testing.assert_close(together[:1], exact(images[:1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[1:], resized(images[1:]), rtol=1e-6, atol=1e-6)


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
    assert says(error, f"at ({box[0]}, {box[1]})", "12 x 17", "Move it")
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
        (name,) = arguments
        with pytest.raises(TypeError, match="whole pixels") as error:
            Crop(**given)
        assert says(error, repr(value), name if name.endswith("size") else "box")


@pytest.mark.parametrize("given", [{"size": (4, 4, 4)}, {"image_size": (3, 12, 17)}, {"image_size": 12}], ids=str)
def test_sizes_are_height_and_width(given):
    ((name, value),) = given.items()
    with pytest.raises(TypeError, match=name) as error:
        Crop(0, 0, 4, 4, **{"image_size": SIZE, **given})
    assert says(error, str(value), "(height, width)")


@pytest.mark.parametrize("keep_size", [False, True])
@pytest.mark.parametrize(
    "factor", [0, -1, -0.5, float("nan"), float("inf"), (1, 0), (2, float("inf")), (1, 2, 3)], ids=str
)
def test_scales_that_are_none(factor, keep_size):
    with pytest.raises(ValueError, match="positive") as error:
        Scale(factor, keep_size)
    assert says(error, f"scale is {factor}")


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
