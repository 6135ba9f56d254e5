"""What the comparison records: thresholds of the development images, and rows without a network."""

import numpy as np
import pytest

from acr_reg.demo.baselines import all_background
from acr_reg.demo.comparison import at_development_threshold, baseline_row
from acr_reg.metrics import CamMeanIoU


def test_the_threshold_comes_from_the_development_images() -> None:
    def scores(value: float) -> CamMeanIoU:
        counter = CamMeanIoU(2)
        counter.update(np.array([[[value, 0.3]]]), np.array([[1, 0]]), [1])
        return counter

    development, shown = scores(0.35).compute(), scores(0.3).compute()
    found = at_development_threshold(shown, development)
    assert found.threshold == 0.3
    assert found.miou == pytest.approx(0.25)
    assert max(found.curve) == pytest.approx(0.25)


def test_a_row_without_a_network_has_class_maps_only() -> None:
    nothing = all_background([(np.zeros((4, 6), int), [])], 2)
    assert baseline_row("all background", "fused map", nothing, nothing).training is None
