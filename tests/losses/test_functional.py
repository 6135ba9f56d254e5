"""The terms as pure functions: the distance of rows, its mean over rows, and the term of class maps."""

import math

import pytest
import torch
import torch.nn.functional as F

from acr_reg import HorizontalFlip, Scale, VerticalFlip, normalize_cam
from acr_reg.losses.functional import cam_consistency, row_consistency, row_distance
from tests.support.attention import VIEWS, generator, says
from tests.support.pairs import random_cams


def test_functions_average_over_images_heads_and_rows():
    a, b = torch.rand(2, 3, 4, 5, generator=generator(1)), torch.rand(2, 3, 4, 5, generator=generator(2))
    assert row_consistency(a, b).item() == pytest.approx((a - b).abs().sum(-1).mean().item())
    assert row_consistency(a, b, normalize="mean").item() == pytest.approx((a - b).abs().mean().item())
    assert row_consistency(a, b, "l2").item() == pytest.approx(((a - b) ** 2).sum(-1).mean().item())


def test_functions_refuse_unknown_options():
    rows = torch.rand(1, 1, 2, 3, generator=generator(1))
    with pytest.raises(ValueError, match="distance='kl'") as error:
        row_consistency(rows, rows, "kl")
    assert says(error, '"l1"', '"l2"', '"js"')
    with pytest.raises(ValueError, match="normalize='sum'") as error:
        row_consistency(rows, rows, normalize="sum")
    assert '"row"' in str(error.value)
    with pytest.raises(ValueError, match="mode='softmax'") as error:
        normalize_cam(rows, "softmax")
    assert '"minmax"' in str(error.value)


def test_js_is_non_negative_in_float32():
    a = torch.randn(2000, 100, generator=generator(0)).softmax(-1)
    b = a * (1 + 1e-4 * torch.randn(2000, 100, generator=generator(1)))
    assert row_distance(a, b / b.sum(-1, keepdim=True), "js").min() >= 0
    assert row_distance(3 * a, b, "js").min() > 0  # rows need not sum to 1


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("factor", [1.0, 1e-3], ids=["probabilities", "rows that sum to less"])
def test_js_keeps_its_digits_where_rows_agree(apart, factor):
    """The formula is a difference of logarithms: taken literally in float32, the value was 22% off, and the gradient
    24%, where logits agree to 1e-3."""
    logits = 2 * torch.randn(50, 64, generator=generator(1))
    a = factor * logits.softmax(-1)
    b = factor * (logits + apart * torch.randn(50, 64, generator=generator(2))).softmax(-1)
    a.requires_grad_()
    found = row_distance(a, b, "js").sum()
    (gradient,) = torch.autograd.grad(found, a)
    a, b = a.detach().double(), b.double()
    middle = (a + b) / 2
    exact = 0.5 * (a * (a / middle).log() + b * (b / middle).log()).sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    slope = 0.5 * (a / middle).log()
    assert (gradient - slope).norm() < 1e-3 * slope.norm()


def test_js_of_rows_with_zeros_is_finite_to_the_second_derivative():
    a = torch.tensor([[0.0, 1.0, 0.0, 1e-38, 1e-20], [0.5, 0.5, 0.0, 0.0, 0.0]]).requires_grad_()
    b = torch.tensor([[1.0, 0.0, 0.0, 1e-20, 1e-38], [0.5, 0.5, 0.0, 0.0, 0.0]]).requires_grad_()
    value = row_distance(a, b, "js")
    assert value.tolist() == pytest.approx([math.log(2), 0])
    assert value[1] == 0
    first = torch.autograd.grad(value.sum(), (a, b), create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), (a, b))
    assert all(one.isfinite().all() for one in (*first, *second))


@pytest.mark.parametrize("sharpness", [10, 40, 1000])
def test_js_of_saturated_rows_has_a_second_derivative(sharpness):
    logits = [sharpness * torch.randn(20, 64, generator=generator(seed)) for seed in (1, 2)]
    a, b = (one.requires_grad_() for one in logits)
    first = torch.autograd.grad(row_distance(a.softmax(-1), b.softmax(-1), "js").sum(), (a, b), create_graph=True)
    second = torch.autograd.grad(sum((one * one.detach().sign()).sum() for one in first), (a, b))
    assert all(one.isfinite().all() for one in (*first, *second))


def test_cam_term_under_scale_equals_interpolation():
    cam_a, cam_b = random_cams((4, 6), (8, 12))
    a, b = normalize_cam(cam_a), normalize_cam(cam_b)
    down = F.interpolate(b, size=(4, 6), mode="bilinear", antialias=True, align_corners=False)
    expected = (a - down).abs().mean().item()
    assert cam_consistency(cam_a, cam_b, Scale(2)).item() == pytest.approx(expected, rel=1e-9)


def test_cam_term_is_zero_on_equivariant_maps_of_any_magnitude():
    cam_a = torch.rand(2, 3, 4, 6, generator=generator(1))
    for name, (view, _) in VIEWS.items():
        assert cam_consistency(cam_a, view(cam_a), view).item() == 0, name
    assert cam_consistency(cam_a, 8 * HorizontalFlip()(cam_a), HorizontalFlip()).item() == 0
    assert cam_consistency(cam_a, cam_a, HorizontalFlip()).item() > 0.1


def test_absent_classes_get_no_gradient():
    cams = random_cams((3, 5), (3, 5))
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]])
    cam_consistency(*cams, HorizontalFlip(), labels=labels).backward()
    assert all(((cam.grad.abs().sum((-2, -1)) > 0) == (labels > 0)).all() for cam in cams)


@pytest.mark.parametrize("mode", ["max", "minmax", None])
def test_gradcheck_of_class_maps(mode):
    cams = [torch.randn(2, 2, 2, 3, generator=generator(seed), dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    labels = torch.tensor([[1, 0], [1, 1]])

    def loss(cam_a, cam_b):
        return cam_consistency(cam_a, cam_b, VerticalFlip(), "l1", labels, normalize=mode)

    assert torch.autograd.gradcheck(loss, cams)
