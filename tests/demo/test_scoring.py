"""Scores of a trained model."""

import pytest
import torch

from acr_reg.demo.scoring import resized


def test_maps_reach_the_masks_size_in_zero_to_one() -> None:
    maps = resized(torch.rand(3, 4, 6) + 5, (37, 50))
    assert maps.shape == (3, 37, 50)
    assert maps.amin((1, 2)).tolist() == [0, 0, 0]
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1, 1])
    assert resized(torch.zeros(0, 4, 6), (5, 7)).shape == (0, 5, 7)
