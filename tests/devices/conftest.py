"""The stand-in device of these tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.devices import stand_in_devices


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with stand_in_devices() as device:
        yield device
