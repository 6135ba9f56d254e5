"""Every test here draws the same numbers and leaves no mode behind."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import _pop_mode

from tests.support.capturing import modes


@pytest.fixture(autouse=True, scope="module")
def _thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed_and_clean_up() -> Iterator[None]:
    gc.freeze()  # the collector passes over what was there before: collecting takes milliseconds, not a second
    torch.manual_seed(0)
    yield
    left = modes()
    while modes():  # so that a mode that one test left behind fails that test alone
        _pop_mode()
    assert left == 0, "a mode was left behind"


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed under this fixture is freed by its last reference."""
    gc.disable()
    yield
    gc.enable()
