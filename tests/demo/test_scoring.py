"""Scores of a trained model."""

import numpy as np
import pytest
import torch
from torch import Tensor

from acr_reg import AttentionMaps
from acr_reg.demo.scoring import Reading, Truth, resized, score


def test_maps_reach_the_masks_size_in_zero_to_one() -> None:
    maps = resized(torch.rand(3, 4, 6) + 5, (37, 50))
    assert maps.shape == (3, 37, 50)
    assert maps.amin((1, 2)).tolist() == [0, 0, 0]
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1, 1])
    assert resized(torch.zeros(0, 4, 6), (5, 7)).shape == (0, 5, 7)


def test_every_kind_of_maps_is_scored_over_the_image_and_its_flip() -> None:
    """The masks are the first channel; maps that follow it are perfect, maps of one place are not."""
    rows = torch.rand(2, 1, 18, 18).softmax(-1)
    attention = AttentionMaps.from_tensors([rows], num_prefix_tokens=2, class_tokens=2, grid=(4, 4))

    def read(images: Tensor, labels: Tensor) -> Reading:
        followed = images[:, :1].expand(-1, 2, -1, -1)
        fixed = torch.zeros_like(followed)
        fixed[..., 0] = 1
        return Reading(labels, attention, {"followed": followed, "fixed": fixed})

    images = torch.zeros(2, 3, 4, 4)
    images[..., :2] = 1
    masks = list(images[:, 0].numpy().astype(np.uint8))
    steps: list[int] = []
    found = score(read, [Truth(images, torch.tensor([[1.0, 0.0]] * 2), masks)] * 2, True, lambda: steps.append(1))
    assert found.maps["followed"].best_miou == 1
    assert 0 < found.maps["fixed"].best_miou < 1
    assert found.mean_ap == 1
    assert set(found.terms) == {"activation", "affinity", "entropy"}
    assert len(steps) == 2
