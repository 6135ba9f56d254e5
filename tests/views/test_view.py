"""What a view does to images and dense maps of any dtype, layout and mode; what it shows; how it prints and pickles."""

import copy
import itertools
import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch.utils.flop_counter import FlopCounterMode

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
)
from acr_reg.views import resampling
from acr_reg.views.resampling import LatticeMap
from acr_reg.views.view import map_between
from tests.support.attention import explicit, says
from tests.support.tensor_watch import TensorWatch
from tests.support.views import (
    BEYOND,
    BOXES,
    CROPS,
    EXACT,
    EXACT_CROPS,
    SIZE,
    any_box,
    any_box_beyond,
    any_exact,
    interpolate,
    noise,
)

any_size = pytest.mark.parametrize("size", [(4, 6), (6, 4), (5, 3), (1, 7), (7, 1), (2, 33)], ids=str)
CROPS_AND_A_TURN = [
    Crop(1, 2, 6, 9, size=6, image_size=(12, 16)),
    Compose([Rotate90(), Crop(4, 1, 8, 7, size=6, image_size=(16, 12))]),
    Compose([Crop(-2, -3, 14, 14, size=6, image_size=(12, 16), pad=True), HorizontalFlip()]),
]
VIEWS = {
    "crop": Crop(1, 2, 6, 9, image_size=(12, 16)),
    "resized": CROPS_AND_A_TURN[0],
    "padded": Crop(-2, -3, 20, 18, image_size=(12, 16), pad=True),
    "in place": Scale(0.7, keep_size=True),
    "each": PerImage(CROPS_AND_A_TURN),
    "flip": HorizontalFlip(),
    "scaled": Scale(0.5),
    "enlarged": Scale(2),
    "each exact": PerImage([HorizontalFlip(), Identity(), VerticalFlip()]),
}
any_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
any_float = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
ALL_VIEWS = [view for view, _, _ in EXACT.values()] + [Scale(0.5), Scale((2, 3)), Compose([Scale(2), Rotate90()])]
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
any_kind = pytest.mark.parametrize("view", [*KINDS, *ALL_VIEWS], ids=repr)
any_kind_or_inverse = pytest.mark.parametrize("view", [*KINDS, *ALL_VIEWS, *(v.inverse for v in ALL_VIEWS)], ids=repr)


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


# Dtypes, layouts and modes


@any_view
@any_float
def test_every_float_keeps_its_dtype_and_is_rounded_once(view, dtype):
    images = noise(3, 2, 12, 16, dtype=torch.float64).to(dtype)
    moved, exact = view(images), view(images.double())
    assert moved.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 4 * torch.finfo(dtype).eps
    assert ((moved.double() - exact).abs() <= eps * exact.abs() + (1e-6 if dtype != torch.float64 else 1e-15)).all()
    back = view.align(moved, (12, 16))
    assert back.dtype == dtype
    assert back.shape == images.shape


@any_view
def test_memory_may_lie_in_any_order(view):
    images = noise(3, 4, 12, 16, dtype=torch.float64)
    expected = view(images)
    orders = {
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.mT.contiguous().mT,
        "strided": torch.stack([images, images + 1], -1)[..., 0],
        "batch last": images.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    for name, ordered in orders.items():
        assert not ordered.is_contiguous(), name
        torch.testing.assert_close(view(ordered), expected, rtol=1e-12, atol=1e-12, msg=name)
    expanded = images[:, :1].expand(3, 4, 12, 16)
    torch.testing.assert_close(view(expanded), view(expanded.contiguous()), rtol=1e-12, atol=1e-12)


@any_view
def test_the_input_is_neither_changed_nor_shared(view):
    images = noise(3, 2, 12, 16, dtype=torch.float64)
    before = images.clone()
    view(images).zero_()
    assert torch.equal(images, before)


@any_view
def test_autocast_does_not_touch_a_view(view):
    images = noise(3, 2, 12, 16, dtype=torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = view(images.to(dtype))
        assert cast.dtype == dtype
        assert torch.equal(cast, view(images.to(dtype)))


@any_view
def test_inference_mode_gives_the_same_and_training_follows(view):
    images = noise(3, 2, 12, 16, dtype=torch.float64)
    with torch.inference_mode():
        evaluated = view(images)
        assert evaluated.is_inference()
        shown = view.valid((12, 16))
    images.requires_grad_()
    moved = view(images)
    assert torch.equal(moved, evaluated)
    assert torch.equal(view.valid((12, 16)), shown)
    moved.square().sum().backward()
    assert images.grad.abs().sum() > 0
    lattice = Lattice(*view.output_size((12, 16)))
    with torch.inference_mode():
        map_between(view, Lattice(12, 16), lattice, "cpu").tokens(images.flatten(2))
    tokens = noise(3, 2, 192, dtype=torch.float64).requires_grad_()
    map_between(view, Lattice(12, 16), lattice, "cpu").tokens(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


@any_view
def test_gradient_is_the_transposed_map(view):
    """<view(x), y> = <x, gradient>: to the first order and, of the gradient, to the second."""
    x = noise(3, 2, 12, 16, dtype=torch.float64).requires_grad_()
    y = noise(3, 2, *view.output_size((12, 16)), seed=1, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad((view(x) * y).sum(), x, create_graph=True)
    torch.testing.assert_close((grad * x).sum(), (view(x) * y).sum())
    (again,) = torch.autograd.grad((grad * x.detach()).sum(), y)
    torch.testing.assert_close(again, view(x.detach()))


@any_view
def test_no_images_give_no_views(view):
    if view.num_images > 1:
        with pytest.raises(ValueError, match="a batch of 0"):
            view(torch.zeros(0, 2, 12, 16))
        return
    assert view(torch.zeros(0, 2, 12, 16)).shape == (0, 2, *view.output_size((12, 16)))
    assert view(torch.zeros(2, 0, 12, 16)).shape == (2, 0, *view.output_size((12, 16)))


@pytest.mark.parametrize("name", ["crop", "resized", "padded", "each", "each exact"])
def test_shapes_alone_are_viewed_on_the_meta_device(name):
    view = VIEWS[name]
    assert view(torch.zeros(3, 2, 12, 16, device="meta")).shape == (3, 2, *view.output_size((12, 16)))


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


# The work: exact views copy once, and resampling reads a band of pixels

LARGE = (150, 201)
LARGE_VIEWS = {
    "crops": PerImage([Crop(*box, size=(70, 129), image_size=LARGE) for box in ((9, 3, 141, 198), (80, 99, 20, 90))]),
    "padded and turned": Compose([Crop(-40, 20, 200, 200, 96, image_size=LARGE, pad=True), Rotate90()]),
    "shrunk": Compose([HorizontalFlip(), Scale(0.4)]),
    "enlarged along one axis": Scale((1, 1.7)),
    "in place, each": PerImage([Scale(0.6, keep_size=True), Compose([Scale(1.8, keep_size=True), VerticalFlip()])]),
}
any_large = pytest.mark.parametrize("view", LARGE_VIEWS.values(), ids=LARGE_VIEWS)


@any_large
def test_large_images_are_read_in_blocks_and_give_what_whole_products_give(view, monkeypatch):
    images = noise(2, 2, *LARGE, dtype=torch.float64).requires_grad_()
    found, back = view(images), view.align(view(images), (75, 201))
    (gradient,) = torch.autograd.grad(found.square().sum() + back.square().sum(), images)
    monkeypatch.setattr(resampling, "_BLOCK", 10**6)
    whole, whole_back = view(images), view.align(view(images), (75, 201))
    (expected,) = torch.autograd.grad(whole.square().sum() + whole_back.square().sum(), images)
    for one, other in ((found, whole), (back, whole_back), (gradient, expected)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(100, 90), (3, 100, 90), (1, 3, 100, 90), (0, 3, 100, 90), (2, 0, 100, 90)], ids=str)
def test_large_images_may_come_in_any_shape(shape):
    images = noise(*shape)
    found = Scale(0.5)(images)
    assert found.shape == (*shape[:-2], 50, 45)
    assert found.numel() == 0 or torch.equal(found, Scale(0.5)(images.reshape(-1, 100, 90)).reshape(found.shape))


@any_large
def test_large_images_may_lie_in_any_order(view):
    images = noise(2, 2, *LARGE, dtype=torch.float64)
    expected = view(images)
    orders = (
        images.to(memory_format=torch.channels_last),
        images.mT.contiguous().mT,
        images.repeat_interleave(2, -1)[..., ::2],
        images[:, :1].expand(-1, 2, -1, -1),
    )
    for given in orders[:-1]:
        torch.testing.assert_close(view(given), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(view(orders[-1])[:, 1], expected[:, 0], rtol=1e-12, atol=1e-12)
    half = view(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, view(images.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_the_products_of_an_image_grow_with_its_pixels(factor):
    """A product with all pixels of a row for each output pixel would grow with their cube: eightfold."""
    counted = []
    for size in (256, 512):
        with FlopCounterMode(display=False) as counter:
            Scale(factor)(torch.zeros(1, 1, size, size))
        counted.append(counter.get_total_flops())
    assert 3.5 * counted[0] < counted[1] < 4.5 * counted[0]


@pytest.mark.parametrize("view", [HorizontalFlip(), Rotate90(2), Crop(1, 2, 6, 9, image_size=(12, 16)), Identity()])
def test_an_exact_view_is_one_copy(view):
    images = torch.zeros(3, 64, 12, 16)
    with TensorWatch() as made:
        moved = view(images)
    assert moved.numel() <= made.written < 1.1 * moved.numel()


def test_a_flip_of_one_size_is_planned_once_and_a_crop_is_not_kept(monkeypatch):
    made, between = [], LatticeMap.between
    monkeypatch.setattr(LatticeMap, "between", lambda *given: made.append(given) or between(*given))
    for _ in range(3):
        images = noise(2, 3, 23, 29)
        assert torch.equal(HorizontalFlip()(images), images.flip(-1))
    assert len(made) == 1
    for view in (Crop(1, 2, 6, 9, size=6, image_size=(23, 29)), Scale(0.7, keep_size=True), Scale(2)):
        made.clear()
        view(images)
        view(images)
        assert len(made) == 2


@pytest.mark.parametrize("view", [PerImage([HorizontalFlip(), Rotate90(2)]), PerImage([Rotate90(), HorizontalFlip()])])
def test_views_of_each_image_are_joined_under_autocast_in_any_precision(view):
    images = noise(2, 3, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = view(images)
    assert torch.equal(cast, view(images))


# What a view shows, and where it leads back


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


# As values


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


def test_the_text_of_a_view_is_the_code_that_makes_it():
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


@any_kind_or_inverse
def test_views_are_copied_and_pickled(view):
    for one in (view, view.inverse):
        images = noise(view.num_images, 1, *(one.input_size or (4, 6)))
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
            assert other == one
            assert hash(other) == hash(one)
            assert other.inverse == one.inverse
            assert repr(other) == repr(one)
            assert torch.equal(other(images), one(images))


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


def assert_aligned(a, b, view):
    """The loss takes the attention of images and of their view, which has the first one's shape once aligned."""
    with torch.no_grad():
        assert AllPairsConsistencyLoss(view)(AttentionMaps([a]), AttentionMaps([b])).isfinite()
    assert align_attention(b.explicit, view, b.layout, a.layout).shape == a.explicit.shape


@pytest.mark.parametrize(("size", "out"), [((255, 255), 448), ((60, 60), 224), ((96, 111), 448)], ids=str)
def test_an_image_that_the_patch_does_not_divide_may_be_cropped_to_one_that_it_does(size, out):
    """15 tokens of 16 px on 255 px, and 28 on the 448 px that the image is resized to: 15 * 448 / 255 are but 26."""
    view = Crop(0, 0, *size, size=out, image_size=size)
    assert_aligned(tokens_of(size), tokens_of((out, out)), view)


def test_images_that_the_patch_does_not_divide_may_be_turned_each_by_itself():
    views = [
        Crop(0, 0, 239, 224, size=224, image_size=(239, 224)),
        Compose([Rotate90(), Crop(0, 0, 224, 239, size=224, image_size=(224, 239))]),
    ]
    assert_aligned(tokens_of((239, 224), batch=2), tokens_of((224, 224), batch=2), PerImage(views))


# Bad input


def test_integer_images_cannot_be_resampled():
    images = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8") as error:
        Scale(2)(images)
    assert says(error, "(1, 3, 4, 6)", "Scale(2)", ".float()")
    with pytest.raises(TypeError, match="uint8") as error:
        HorizontalFlip()(images, (5, 7))
    assert says(error, "HorizontalFlip()")


def test_resampling_integers_is_refused_of_a_batch_where_one_resamples():
    view = PerImage([Crop(0, 0, 4, 4, image_size=(8, 8)), Crop(0, 0, 5, 5, size=4, image_size=(8, 8))])
    with pytest.raises(TypeError, match="uint8") as error:
        view(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert says(error, "(2, 3, 8, 8)", "PerImage([", ".float()")


def test_what_is_no_image():
    with pytest.raises(TypeError, match=r"\(6,\)") as error:
        HorizontalFlip()(torch.zeros(6))
    assert says(error, "(..., H, W)")
    for other, kind in [([[1.0, 2.0]], "list"), (torch.zeros(4, 6).numpy(), "ndarray")]:
        with pytest.raises(TypeError, match=kind) as error:
            HorizontalFlip()(other)
        assert says(error, "tensor", "(..., H, W)")


def test_a_scale_that_leaves_nothing():
    with pytest.raises(ValueError, match="leaves 0 x 1") as error:
        Scale((0.1, 0.2))(torch.zeros(1, 1, 4, 6))
    assert says(error, "Scale((0.1, 0.2))", "4 x 6", "at least 1 x 1")


def test_a_map_too_small_for_a_crop():
    view = Crop(0, 0, 8, 8, image_size=(64, 64))
    with pytest.raises(ValueError, match="leaves 0 x 0") as error:
        view(noise(1, 1, 2, 2))
    assert says(error, repr(view), "2 x 2", "at least 1 x 1")


def test_long_views_are_cut_in_messages():
    view = PerImage(CROPS * 8)
    with pytest.raises(ValueError, match="32 images") as error:
        view(noise(5, 1, 12, 16))
    assert says(error, "PerImage([Crop(0, 0, 6, 6", "...", "a batch of 5")
    assert len(str(error.value)) < 400
