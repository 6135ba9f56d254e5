"""Class maps of one image."""

import numpy as np
import pytest


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return {14: rng.random((5, 8), dtype=np.float32), 2: rng.random((5, 8), dtype=np.float32)}
