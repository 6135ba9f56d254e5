"""The boundary between exact and resampled from both sides; crops in every dtype, layout and mode."""

import itertools

import pytest
import torch

from acr_reg import Compose, Crop, HorizontalFlip, Identity, Lattice, PerImage, Rotate90, Scale, VerticalFlip
from acr_reg.views.view import map_between
from tests.support.attention import generator
from tests.support.oracles import filter_row

GRID = (5, 7)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


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


# Offsets in tokens


@pytest.mark.parametrize("stride", [1.0, 14.0, 16.0, 1 / 3])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("whole", [0, 1, -2])
def test_a_ten_thousandth_of_a_token_is_where_resampling_begins(stride, axis, whole):
    values = noise(2, 35)
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
    values = noise(2, 35)
    mapping = map_between(Identity(), *shifted(by), "cpu")
    assert mapping.is_exact == (offset == round(offset))
    torch.testing.assert_close(mapping.tokens(values), shift_by_loop(values, by), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("view", [HorizontalFlip(), VerticalFlip(), Rotate90(), Rotate90(2)], ids=repr)
def test_mirrored_the_boundary_is_where_both_offsets_add_up(view):
    """A lattice off its image's middle by d falls on its mirror image off by 2 d."""
    values = noise(1, 25)
    moved = {}
    for d in (0.0, 0.45e-4, 0.55e-4):
        lattice = Lattice(5, 5, (16.0, 16.0), (16 * d, 16 * d), (80.0, 80.0))
        mapping = map_between(view, lattice, lattice, "cpu")
        assert mapping.is_exact == (d < 0.5e-4)
        moved[d] = mapping.tokens(values)
    assert torch.equal(moved[0.0], moved[0.45e-4])
    assert 0 < (moved[0.0] - moved[0.55e-4]).abs().max() < 1e-3


# Scales near 1


def test_a_scale_near_one_is_exact_until_its_outermost_token_leaves():
    """On 41 pixels the outermost is 20 from the middle: a scale of 1 + e moves it by 20 e."""
    images = noise(1, 2, 41, 41)
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
    values = noise(1, 24)
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


def test_one_image_that_resamples_makes_no_other_inexact():
    """Exact images of such a batch are read by weights, to rounding."""
    images = noise(2, 3, 12, 16, dtype=torch.float32)
    exact, resized = Crop(2, 3, 6, 6, image_size=(12, 16)), Crop(2, 3, 7, 8, size=6, image_size=(12, 16))
    together = PerImage([exact, resized])(images)
    torch.testing.assert_close(together[:1], exact(images[:1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[1:], resized(images[1:]), rtol=1e-6, atol=1e-6)


# Dtypes, layouts and modes

CROPS = [
    Crop(1, 2, 6, 9, size=6, image_size=(12, 16)),
    Compose([Rotate90(), Crop(4, 1, 8, 7, size=6, image_size=(16, 12))]),
    Compose([Crop(-2, -3, 14, 14, size=6, image_size=(12, 16), pad=True), HorizontalFlip()]),
]
VIEWS = {
    "crop": Crop(1, 2, 6, 9, image_size=(12, 16)),
    "resized": CROPS[0],
    "padded": Crop(-2, -3, 20, 18, image_size=(12, 16), pad=True),
    "in place": Scale(0.7, keep_size=True),
    "each": PerImage(CROPS),
    "each exact": PerImage([HorizontalFlip(), Identity(), VerticalFlip()]),
}
any_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
any_float = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@any_view
@any_float
def test_every_float_keeps_its_dtype_and_is_rounded_once(view, dtype):
    images = noise(3, 2, 12, 16).to(dtype)
    moved, exact = view(images), view(images.double())
    assert moved.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 4 * torch.finfo(dtype).eps
    assert ((moved.double() - exact).abs() <= eps * exact.abs() + (1e-6 if dtype != torch.float64 else 1e-15)).all()
    back = view.align(moved, (12, 16))
    assert back.dtype == dtype
    assert back.shape == images.shape


@any_view
def test_memory_may_lie_in_any_order(view):
    images = noise(3, 4, 12, 16)
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
    images = noise(3, 2, 12, 16)
    before = images.clone()
    view(images).zero_()
    assert torch.equal(images, before)


@any_view
def test_autocast_does_not_touch_a_view(view):
    images = noise(3, 2, 12, 16, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = view(images.to(dtype))
        assert cast.dtype == dtype
        assert torch.equal(cast, view(images.to(dtype)))


@any_view
def test_inference_mode_gives_the_same_and_training_follows(view):
    images = noise(3, 2, 12, 16)
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
    tokens = noise(3, 2, 192).requires_grad_()
    map_between(view, Lattice(12, 16), lattice, "cpu").tokens(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


@any_view
def test_gradient_is_the_transposed_map(view):
    """<view(x), y> = <x, gradient>: to the first order and, of the gradient, to the second."""
    x = noise(3, 2, 12, 16).requires_grad_()
    y = noise(3, 2, *view.output_size((12, 16)), seed=1).requires_grad_()
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


@pytest.mark.parametrize("name", ["crop", "padded", "each exact"])
def test_shapes_alone_are_viewed_on_the_meta_device(name):
    view = VIEWS[name]
    assert view(torch.zeros(3, 2, 12, 16, device="meta")).shape == (3, 2, *view.output_size((12, 16)))
