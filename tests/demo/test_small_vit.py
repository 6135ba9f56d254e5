"""The demo's stem keeps token centres mirrored under a flip; the usual 3x3 stem does not."""

import statistics
from collections.abc import Callable

import torch
from torch import nn

from acr_reg.demo.small_vit import STRIDE, ClassTokenViT, SmallViT, conv_stem, mirrored_stem

WIDTH, GRID = 96, (4, 8)


def token_centre(stem: nn.Module, column: int) -> float:
    """In pixels along x: where a token of the middle row looks, by the centroid of its squared gradients.

    The stem's normalisation sees the whole image; its faint gradient is cut off.
    """
    images = torch.randn(8, 3, GRID[0] * STRIDE, GRID[1] * STRIDE, requires_grad=True)
    tokens = stem(images)[:, :, GRID[0] // 2, column]
    energy = torch.zeros(images.shape[-1])
    for _ in range(32):
        (gradient,) = torch.autograd.grad((tokens * torch.randn(WIDTH)).sum(), images, retain_graph=True)
        energy += gradient.square().sum((0, 1, 2))
    energy[energy < 1e-2 * energy.max()] = 0
    return (energy @ torch.arange(len(energy), dtype=torch.float32) / energy.sum()).item()


def offset_under_flip(make_stem: Callable[[], nn.Module]) -> float:
    """In pixels: how far a token looks from where the token that a flip matches with it looks.

    Averaged over first weights, each of which leans a little to one side.
    """
    torch.manual_seed(0)
    offsets = []
    for stem in (make_stem() for _ in range(8)):
        left, right = (token_centre(stem, column) for column in (2, GRID[1] - 1 - 2))
        offsets.append(left + right - (GRID[1] * STRIDE - 1))
    return abs(statistics.mean(offsets))


def test_the_demo_stem_keeps_token_centres_under_a_flip() -> None:
    assert offset_under_flip(lambda: SmallViT(2, width=WIDTH).stem) < 0.1


def test_the_usual_stem_moves_them_by_most_of_a_token() -> None:
    assert 6.7 < offset_under_flip(lambda: conv_stem(WIDTH, kernel=3)) < 7.3


def test_mirrored_kernels_make_the_stem_equivariant_to_the_bit_of_rounding() -> None:
    """With kernels that are their own mirror image the 4x4 stem commutes with a flip; the 3x3 stem does not."""
    images = torch.randn(2, 3, 32, 48)
    gaps = {}
    for kernel in (4, 3):
        stem = mirrored_stem(WIDTH) if kernel == 4 else conv_stem(WIDTH, kernel)
        for layer in stem:
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = (layer.weight.data + layer.weight.data.flip(-1)) / 2
        with torch.no_grad():
            gaps[kernel] = (stem(images.flip(-1)).flip(-1) - stem(images)).abs().max().item()
    assert gaps[4] < 1e-4
    assert gaps[3] > 0.1


def test_the_model_takes_images_that_are_not_square() -> None:
    model = SmallViT(5, size=(32, 48), width=24, depth=1, heads=2)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 5)
    assert model(torch.randn(2, 3, 64, 24)).shape == (2, 5)


def test_the_class_token_network_gives_a_map_and_a_token_for_each_class() -> None:
    torch.manual_seed(0)
    model = ClassTokenViT(5).eval()
    output = model(torch.randn(2, 3, 64, 96))  # not the size of its position table
    assert output.maps.shape == (2, 5, 8, 12)
    assert output.logits.shape == (2, 5)
    assert output.class_tokens.shape == (4, 2, 5, 96)
