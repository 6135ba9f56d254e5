"""What a view and a mask must fit: images of the size in pixels that a view is for, and a mask of each image."""

import pytest
import torch

from acr_reg import AttentionMaps, Crop, HorizontalFlip, Identity
from tests.support.attention import explicit, layout_of, random_attention, random_maps
from tests.support.pairs import refused


def pixels(grid, patch=16.0, prefix=1):
    """Attention that knows of its images' pixels."""
    layout = layout_of(grid, prefix, stride=(patch, patch))
    return AttentionMaps([explicit(random_maps(grid, prefix, layers=1)[0], layout)])


@pytest.mark.parametrize(
    ("view", "facts"),
    [
        (Crop(0, 0, 64, 64, image_size=(96, 160)), ["128 x 128 px", "96 x 160 px", "first view"]),
        (Crop(0, 0, 64, 64, size=96, image_size=(128, 128)), ["64 x 64 px", "96 x 96 px", "second view"]),
    ],
    ids=["of images of another size", "resized to another size than the second view had"],
)
def test_a_crop_that_does_not_fit_the_images(view, facts):
    refused(view, pixels((8, 8)), pixels((4, 4)), "images of", "layer 0", *facts)


def test_valid_of_another_batch_beside_a_view_of_the_first_maps():
    a, b = (random_attention((4, 4), seed=seed) for seed in (1, 2))
    valid = torch.ones(3, 4, 4)
    refused(Identity(), a, b, "valid", "shape (3, 4, 4)", "not (2, H, W)", view_a=HorizontalFlip(), valid=valid)
