"""Baselines that use no network."""

import numpy as np
import pytest

from acr_reg.demo.baselines import all_background, centred_ellipse, ellipse, largest_class, location_prior


def test_all_background_scores_the_background_share() -> None:
    mask = np.zeros((4, 6), int)
    mask[:2, :3] = 1
    assert all_background([(mask, [1])], num_classes=2).best_miou == pytest.approx((18 / 24 + 0) / 2)


def test_the_ellipse_finds_an_ellipse_and_takes_the_rarest_label() -> None:
    mask = (ellipse(40, 64) > 0.45).astype(int) * 2
    assert centred_ellipse([(mask, [2])], 3, frequency=[0, 5, 5]).best_miou == 1
    assert centred_ellipse([(mask, [1, 2])], 3, frequency=[0, 5, 4]).best_miou == 1
    assert centred_ellipse([(mask, [1, 2])], 3, frequency=[0, 4, 5]).best_miou < 0.5
    assert centred_ellipse([(np.zeros((4, 6), int), [])], 3, frequency=[0, 1, 1]).best_miou == 1


def test_baselines_without_a_background_class() -> None:
    """Class 0 left and class 1, smaller, right; a photo of class 2 alone."""
    mask = np.zeros((20, 32), int)
    mask[:, 20:] = 1
    samples = [(mask, [0, 1]), (np.full((6, 8), 2), [2])]
    largest = largest_class(samples, 3, samples)
    assert largest.per_class_iou == pytest.approx([20 / 32, 0, 1])
    assert location_prior(samples, 3, samples).best_miou > 0.95
    assert location_prior(samples, 3, [(mask[:, ::-1], [0, 1])]).per_class_iou[0] < 0.5
