"""A model, images, labels and views that several files of these tests run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acr_reg import HorizontalFlip, RandomResizedCrop
from tests.support.models.plain import BUILDERS

SIZE = (32, 48)
LABELS = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
VIEWS = {
    "flip": HorizontalFlip(),
    "crops": RandomResizedCrop(SIZE, (0.4, 1)).sample(SIZE, generator=torch.Generator().manual_seed(0)),
}


def model_and_images(kind: str, training: bool = False) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return BUILDERS[kind]().train(training), torch.randn(2, 3, *SIZE)
