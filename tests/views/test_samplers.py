"""Samplers: every draw is a view that can be replayed, and crops are drawn as torchvision draws them."""

import math

import pytest
import torch
import torchvision.transforms as T

from acr_reg import (
    AllPairsConsistencyLoss,
    Compose,
    Crop,
    HorizontalFlip,
    Identity,
    PerImage,
    RandomApply,
    RandomChoice,
    RandomCompose,
    RandomResizedCrop,
    RandomScale,
    Rotate90,
    Scale,
    VerticalFlip,
    View,
)
from acr_reg.views.samplers import Sampler
from tests.support.attention import generator, random_attention, says

# Each sampler, and the size that it gives of 24 x 40; None where that is random.
SAMPLERS = {
    "apply": (RandomApply(HorizontalFlip()), (24, 40)),
    "apply a sampler": (RandomApply(RandomScale((0.5, 2), keep_size=True), p=0.8), (24, 40)),
    "choice": (RandomChoice([Identity(), HorizontalFlip(), VerticalFlip(), Rotate90(2)]), (24, 40)),
    "scale": (RandomScale((0.5, 2)), None),
    "scale in place": (RandomScale((0.5, 2), keep_size=True), (24, 40)),
    "crop": (RandomResizedCrop(16), (16, 16)),
    "crop to a size": (RandomResizedCrop((16, 8), scale=(0.3, 0.9), ratio=(0.5, 1)), (16, 8)),
    "composed": (
        RandomCompose(
            [RandomApply(HorizontalFlip()), RandomChoice([Rotate90(k) for k in range(4)]), RandomResizedCrop(8)]
        ),
        (8, 8),
    ),
    "nested": (
        RandomChoice([RandomCompose([RandomResizedCrop((20, 12)), Rotate90()]), RandomResizedCrop((12, 20))]),
        (12, 20),
    ),
}
any_sampler = pytest.mark.parametrize("name", SAMPLERS)
IMAGES = torch.rand(3, 2, 24, 40, generator=generator(0))


@any_sampler
def test_a_draw_is_a_view(name):
    sampler, size = SAMPLERS[name]
    for seed in range(8):
        view = sampler.sample(IMAGES, generator=generator(seed))
        assert isinstance(view, View)
        assert view.num_images == 1
        assert size in (None, view.output_size((24, 40)))
        assert view(IMAGES).shape == (3, 2, *view.output_size((24, 40)))
        assert view.inverse.inverse == view
        again = eval(repr(view))
        assert again == view
        assert torch.equal(again(IMAGES), view(IMAGES))


@any_sampler
def test_a_draw_is_replayed_by_its_generator_or_the_global_one(name):
    sampler, size = SAMPLERS[name]
    for per_image in (False, True) if size else (False,):
        drawn = [sampler.sample(IMAGES, per_image, generator=generator(seed)) for seed in range(12)]
        assert drawn == [sampler.sample(IMAGES, per_image, generator=generator(seed)) for seed in range(12)]
        assert len(set(drawn)) > 1
        torch.manual_seed(7)
        first = sampler.sample(IMAGES, per_image)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        assert sampler.sample(IMAGES, per_image) == first
        own = generator(3)
        one, two = (sampler.sample(IMAGES, per_image, generator=own) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)  # a generator of one's own leaves the global one alone
        assert [one, two] != [drawn[3]] * 2 or name in ("apply", "choice")


@pytest.mark.parametrize("name", [name for name, (_, size) in SAMPLERS.items() if size])
def test_every_image_gets_a_view_of_its_own(name):
    sampler, size = SAMPLERS[name]
    one_by_one = generator(5)
    expected = [sampler.draw((24, 40), one_by_one) for _ in range(3)]
    view = sampler.sample(IMAGES, per_image=True, generator=generator(5))
    assert view.num_images == 3
    assert view == PerImage(expected)
    assert view(IMAGES).shape == (3, 2, *size)
    for image in range(3):
        assert view.of_image(image).affines == expected[image].affines
    several = [sampler.sample(IMAGES, per_image=True, generator=generator(seed)) for seed in range(12)]
    assert any(len(set(each.affines)) > 1 for each in several)


def test_images_or_their_size():
    sampler = RandomResizedCrop(8)
    views = [
        sampler.sample(images, generator=generator(2))
        for images in (IMAGES, IMAGES[0], IMAGES[0, 0], (24, 40), [24, 40], IMAGES.shape[-2:])
    ]
    assert len(set(views)) == 1
    assert views[0].input_size == (24, 40)


def test_scaled_images_are_cropped_to_one_size_each_by_itself():
    """What hosts do: each image scaled by its own factor, then a box of one size."""
    images = torch.rand(4, 3, 33, 47, generator=generator(1))
    sampler = RandomCompose([RandomScale((0.5, 2)), RandomResizedCrop(16)])
    for seed in range(10):
        view = sampler.sample(images, per_image=True, generator=generator(seed))
        assert view(images).shape == (4, 3, 16, 16)


def test_small_images_are_scaled_and_enlarged():
    images = torch.rand(2, 3, 32, 32, generator=generator(1))
    sampler = RandomCompose([RandomScale((0.5, 2)), RandomResizedCrop(224)])
    for seed in range(30):
        assert sampler.sample(images, generator=generator(seed))(images).shape == (2, 3, 224, 224)


# What is drawn


class Recorded(Sampler):
    """Notes the sizes it is asked for."""

    def __init__(self, view):
        self.view, self.sizes = view, []

    def draw(self, size, generator=None):
        self.sizes.append(size)
        return self.view


def test_each_step_is_drawn_for_the_size_that_the_one_before_leaves():
    steps = [
        Recorded(Rotate90()),
        Recorded(Crop(1, 2, 30, 20, image_size=(40, 24))),
        Recorded(Scale(0.25)),
        Recorded(Identity()),
    ]
    view = RandomCompose(steps).sample(IMAGES)
    assert [step.sizes for step in steps] == [[(24, 40)], [(40, 24)], [(30, 20)], [(8, 5)]]
    assert view == Compose([step.view for step in steps])
    assert view.output_size((24, 40)) == (8, 5)


def test_a_step_that_is_a_view_is_taken_as_it_is():
    view = RandomCompose([Rotate90(), RandomResizedCrop(8), VerticalFlip()]).sample(IMAGES, generator=generator(4))
    crop = RandomResizedCrop(8).sample((40, 24), generator=generator(4))
    assert view == Compose([Rotate90(), crop, VerticalFlip()])


def test_a_probability_of_0_and_of_1():
    for seed in range(30):
        assert RandomApply(HorizontalFlip(), p=0).sample(IMAGES, generator=generator(seed)) == Identity()
        assert RandomApply(HorizontalFlip(), p=1).sample(IMAGES, generator=generator(seed)) == HorizontalFlip()
        assert RandomApply(RandomResizedCrop(8), p=1.0).sample(IMAGES, generator=generator(seed)).fixed_size == (8, 8)


def four_errors(share, draws):
    return 4 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_steps_are_applied_with_their_probability(p):
    numbers = generator(0)
    applied = [RandomApply(HorizontalFlip(), p).draw((4, 6), numbers) == HorizontalFlip() for _ in range(1500)]
    assert abs(sum(applied) / 1500 - p) < four_errors(p, 1500)


def test_every_choice_is_as_likely():
    numbers, moves = generator(0), [Rotate90(k) for k in range(4)]
    drawn = [RandomChoice(moves).draw((4, 6), numbers) for _ in range(1500)]
    for move in moves:
        assert abs(drawn.count(move) / 1500 - 0.25) < four_errors(0.25, 1500)


def test_factors_are_uniform():
    numbers = generator(0)
    factors = torch.tensor(
        [1 / float(RandomScale((0.5, 2), True).draw((4, 6), numbers).affines[0].y.slope) for _ in range(1500)]
    )
    assert factors.min() >= 0.5
    assert factors.max() <= 2
    for quantile in (0.25, 0.5, 0.75):
        below = (factors < 0.5 + 1.5 * quantile).float().mean()
        assert abs(below - quantile) < four_errors(quantile, 1500)
    assert RandomScale((0.7, 0.7)).sample(IMAGES) == Scale(0.7)


# Crops as torchvision's


def box_of(view):
    """(top, left, height, width) of a crop, from the map that it is."""
    (affine,), (rows, columns) = view.affines, view.input_size
    return (affine.y.start * rows, affine.x.start * columns, affine.y.slope * rows, affine.x.slope * columns)


def statistics(boxes):
    """Of each box: area, log ratio, where it lies, and whether it touches the edge."""
    top, left, height, width = torch.tensor([[float(value) for value in box] for box in boxes]).T
    return {
        "area": height * width,
        "log ratio": (width / height).log(),
        "log ratio squared": (width / height).log() ** 2,
        "top": top,
        "left": left,
        "top squared": top**2,
        "at the top": (top == 0).float(),
        "at the left": (left == 0).float(),
        "full height": (height == height.max()).float(),
    }


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((48, 48), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((40, 96), (0.2, 0.6), (0.5, 2.0)),
        ((96, 40), (0.5, 1.0), (1 / 3, 3.0)),  # where boxes often do not fit
    ],
    ids=str,
)
def test_boxes_are_drawn_as_torchvision_draws_them(size, scale, ratio):
    draws, numbers = 1500, generator(0)
    sampler = RandomResizedCrop(8, scale, ratio)
    ours = statistics([box_of(sampler.draw(size, numbers)) for _ in range(draws)])
    torch.manual_seed(1)
    image = torch.zeros(1, *size)
    theirs = statistics([T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(draws)])
    for name, values in ours.items():
        error = ((values.var() + theirs[name].var()) / draws).sqrt()
        assert abs(values.mean() - theirs[name].mean()) < 4 * error, name
        assert values.var() > 0, name


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (24, 40), (7, 50), (50, 7)], ids=str)
@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        ((1.0, 1.0), (0.05, 0.1)),
        ((1.0, 1.0), (10.0, 12.0)),
        ((1.0, 1.0), (3.0, 4.0)),
        ((1.0, 1.0), (0.25, 0.3)),
        ((1.0, 1.0), (1.0, 1.0)),
        ((1.0, 1.0), (1.3, 1.4)),
    ],
    ids=str,
)
def test_where_no_box_fits_it_is_torchvisions_in_the_middle(size, scale, ratio):
    torch.manual_seed(0)
    boxes = {T.RandomResizedCrop.get_params(torch.zeros(1, *size), list(scale), list(ratio)) for _ in range(20)}
    (expected,) = boxes  # nothing random is left: none fitted
    assert box_of(RandomResizedCrop(8, scale, ratio).draw(size, generator(0))) == expected


def test_where_torchvisions_box_is_empty_one_pixel_is_left():
    for ratio in [(0.001, 0.002), (200.0, 300.0)]:
        top, left, height, width = box_of(RandomResizedCrop(8, (1, 1), ratio).draw((24, 40), generator(0)))
        assert (height, width) in [(24, 1), (1, 40)]
        assert (top, left) in [(0, 19), (11, 0)]


def test_a_share_of_everything_is_the_whole_image():
    view = RandomResizedCrop((24, 40), scale=(1, 1), ratio=(40 / 24, 40 / 24)).sample(IMAGES)
    assert view == Crop(0, 0, 24, 40, image_size=(24, 40))
    assert torch.equal(view(IMAGES), IMAGES)


def test_a_crop_drawn_for_images_takes_those_only():
    view = RandomResizedCrop(8).sample(IMAGES)
    with pytest.raises(ValueError, match="24 x 40") as error:
        view(torch.zeros(1, 1, 25, 41))
    assert says(error, "25 x 41", "Draw the view")


# Printing


@pytest.mark.parametrize(
    "text",
    [
        "RandomApply(HorizontalFlip(), p=0.5)",
        "RandomApply(RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333)), p=1)",
        "RandomChoice([Rotate90(1), RandomScale((0.5, 2))])",
        "RandomCompose([RandomScale((0.5, 2), keep_size=True), RandomChoice([Identity(), VerticalFlip()])])",
        "RandomResizedCrop((32, 48), scale=(0.5, 1), ratio=(1, 2))",
    ],
)
def test_samplers_are_printed_as_they_are_written(text):
    sampler = eval(text)
    assert isinstance(sampler, Sampler)
    assert repr(sampler) == text


# Bad input


def test_a_size_says_nothing_of_how_many_images():
    with pytest.raises(ValueError, match="per_image=True") as error:
        RandomResizedCrop(8).sample((24, 40), per_image=True)
    assert says(error, "(24, 40)", "(B, C, H, W)")
    for images, per_image in [(IMAGES[0], True), (IMAGES[0, 0, 0], False)]:
        with pytest.raises(ValueError, match="shape") as error:
            RandomResizedCrop(8).sample(images, per_image=per_image)
        assert says(error, str(tuple(images.shape)), "(B, C, H, W)")


def test_the_shape_of_images_is_not_their_size():
    """A view of 3 x 2 pixels would be drawn, and fail far from here."""
    for shape in [IMAGES.shape, (2, 24, 40), (24,)]:
        with pytest.raises((TypeError, ValueError), match="size") as error:
            RandomResizedCrop(8).sample(shape)
        assert says(error, f"{tuple(shape)}", "(H, W)", "images.shape[-2:]")


def test_a_view_of_each_image_of_none():
    with pytest.raises(ValueError, match="holds no images") as error:
        RandomApply(HorizontalFlip()).sample(IMAGES[:0], per_image=True)
    assert says(error, "(0, ", "one view for each")
    with pytest.raises(ValueError, match="There are 0 views"):
        PerImage([])


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        (RandomScale((0.5, 2)), "keep_size=True"),
        (RandomApply(Scale(0.5)), "(0.5, 0.5)"),
        (RandomApply(RandomResizedCrop(8)), "8 x 8"),
    ],
    ids=repr,
)
def test_images_of_a_batch_come_to_one_size(sampler, given):
    seed = 3  # some crop or scale, and some do not
    with pytest.raises(ValueError, match="one output size") as error:
        sampler.sample(IMAGES, per_image=True, generator=generator(seed))
    assert says(error, " and ", given)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities(p):
    with pytest.raises(ValueError, match="probability") as error:
        RandomApply(HorizontalFlip(), p)
    assert says(error, f"p={p}", "[0, 1]")


@pytest.mark.parametrize("factors", [(0, 1), (2, 1), (-1, 1), (0.5, float("inf")), (float("nan"), 1)], ids=str)
def test_factors(factors):
    with pytest.raises(ValueError, match="factors") as error:
        RandomScale(factors)
    assert says(error, f"scale={factors}", "0 < low <= high")


@pytest.mark.parametrize("given", [(0.5, 2), (0.5,), ((0.5, 1, 2),), ("ab",), ((0.5, 2), 2)], ids=str)
def test_two_factors_that_are_no_pair_are_told_how_to_write_the_range(given):
    with pytest.raises(TypeError) as error:
        RandomScale(*given)
    assert says(error, f"scale={given[0]!r}", "RandomScale((0.5, 2))")


@pytest.mark.parametrize(
    "given",
    [
        {"scale": (0, 1)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0, 1)},
        {"ratio": (2, 1)},
        {"ratio": (1, float("inf"))},
        {"scale": 0.5},
        {"ratio": 1},
    ],
    ids=str,
)
def test_shares_and_proportions(given):
    with pytest.raises(ValueError, match="ratio") as error:
        RandomResizedCrop(8, **given)
    ((name, value),) = given.items()
    assert says(error, f"{name}={value}", "0 < low <= high")


@pytest.mark.parametrize("size", [0, (8, 0), -1], ids=str)
def test_a_crop_to_nothing(size):
    with pytest.raises(ValueError, match="resized to") as error:
        RandomResizedCrop(size).sample(IMAGES)
    assert says(error, "at least 1", "24 x 40")


def test_steps_are_views_and_samplers():
    for make in (RandomChoice, RandomCompose):
        for steps in ([], HorizontalFlip(), RandomResizedCrop(8)):
            with pytest.raises(TypeError, match="sequence of views and samplers") as error:
                make(steps)
            assert says(error, repr(steps))
        with pytest.raises(TypeError, match="RandomHorizontalFlip") as error:
            make([HorizontalFlip(), T.RandomHorizontalFlip()])
        assert says(error, "views and samplers of acr_reg", "get_params")
    with pytest.raises(TypeError, match="RandomHorizontalFlip") as error:
        RandomApply(T.RandomHorizontalFlip())
    assert says(error, "views and samplers of acr_reg")


def test_a_sampler_is_no_view():
    sampler = RandomResizedCrop(8)
    with pytest.raises(TypeError, match="RandomResizedCrop") as error:
        AllPairsConsistencyLoss(view=sampler)
    assert says(error, "View", "sampler.sample(images)")
    maps = random_attention((3, 5))
    with pytest.raises(TypeError, match="RandomResizedCrop") as error:
        AllPairsConsistencyLoss()(maps, maps, view=sampler)
    assert says(error, "View", "sampler.sample(images)")
    with pytest.raises(TypeError, match="RandomResizedCrop") as error:
        Compose([HorizontalFlip(), sampler])
    assert says(error, "Pass Views")
    with pytest.raises(TypeError, match="abstract"):
        Sampler()
